//! The figures on file (benches/FIGURES.md): reading, comparing, recording. Nothing here measures.
//!
//! A row says what something cost when its row was written. Growth of up to a tenth (of single runs, three) leaves the row as it is, so that
//! small growths add up against it; only a reason, which is kept in the row, makes it say more.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// A figure that is this much more than the one on file has grown.
const GROWTH: f64 = 0.1;
/// Kernels of one line load the first of these or, hardened, the others: what is on file of the others stays.
const ALTERNATIVES: [&str; 3] = ["find_stale_sockets", "find_stale_udp", "find_stale_tcp"];
/// The same of ways that are run once in a system call: what they meet in caches depends on where the kernel has put rows.
/// (Seen of one tree, on one machine within two hours: a quarter less and a fifth more.)
const GROWTH_OF_SINGLES: f64 = 0.3;
/// What their names have.
const SINGLES: [&str; 4] =
    [", first", ", proving the flow", " refused, no endpoint", "bare device, TCP to a remote backend"];
/// Nanoseconds that cannot be told apart for sure: the kernel's clock counts whole ones.
pub const CLOCK_NS: f64 = 2.0;

/// One of the file's two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Instructions that a kernel's verifier walks through, for each program. The same each time.
    Instructions,
    /// What a way through a program costs on a kind of processor, in references (see src/bpf/reference.rs).
    Ways,
}

impl Table {
    const ALL: [Table; 2] = [Table::Instructions, Table::Ways];

    fn title(self) -> &'static str {
        match self {
            Table::Instructions => "## Instructions that the verifier walks through",
            Table::Ways => "## Ways through the packet programs",
        }
    }

    fn head(self) -> String {
        match self {
            Table::Instructions => line(["kernel", "program", "instructions", "", "why more"], self),
            Table::Ways => line(["processor, kernel", "way", "references", "ns", "why more"], self),
        }
    }

    fn text_of(self, value: f64) -> String {
        match self {
            Table::Instructions => format!("{value:.0}"),
            Table::Ways => format!("{value:.3}"),
        }
    }
}

/// A line of a table; columns are wide enough for what is in them today, so that a change of one row is a change of one
/// line.
fn line([place, name, value, ns, why]: [&str; 5], table: Table) -> String {
    let line = match table {
        Table::Instructions => format!("| {place:<6} | {name:<18} | {value:>12} | {why} |"),
        Table::Ways => format!("| {place:<28} | {name:<62} | {value:>10} | {ns:>4} | {why} |"),
    };
    line.replace("|  |", "| |")
}

/// What was measured: a program or a way, and what it costs. `ns`: of ways, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub name: String,
    pub value: f64,
    pub ns: Option<f64>,
}

#[derive(Clone, Debug, PartialEq)]
struct Row {
    table: Table,
    /// A kernel ("6.18"), or processor and kernel ("AMD EPYC 25.1.1, 6.18").
    place: String,
    found: Found,
    why: String,
}

/// How a figure differs from the one on file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// There is none on file, of no place.
    New,
    /// There is none on file of this place: what only some kernels of a line take, as hardened ones refuse programs.
    Elsewhere,
    Grown,
    Shrunk,
    /// By no more than what is let pass.
    None,
    /// What is on file is not there any more.
    Gone,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    pub table: Table,
    pub name: String,
    pub change: Change,
    pub old: Option<f64>,
    pub new: Option<f64>,
}

impl Difference {
    /// Whether a change must not go in like this.
    pub fn fails(&self) -> bool {
        matches!(self.change, Change::New | Change::Grown)
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |value: Option<f64>| self.table.text_of(value.unwrap_or(f64::NAN));
        write!(f, "{}: ", self.name)?;
        match (self.change, self.old, self.new) {
            (Change::New, ..) => write!(f, "{}, not on file", text(self.new)),
            (Change::Elsewhere, ..) => write!(f, "{}, on file for others than this one only", text(self.new)),
            (Change::Gone, ..) => write!(f, "on file, but not there any more"),
            (_, Some(old), Some(new)) => {
                write!(f, "{} -> {} ({:+.1} %)", text(self.old), text(self.new), (new / old - 1.0) * 100.0)
            }
            _ => Ok(()),
        }
    }
}

/// Whether a way is run once in a system call.
pub fn is_single(way: &str) -> bool {
    SINGLES.iter().any(|part| way.contains(part)) && !way.contains("piece of a datagram")
}

/// `slack`: what a figure may differ by in any case.
fn change(name: &str, old: f64, new: f64, slack: f64) -> Change {
    let most = (old * if is_single(name) { GROWTH_OF_SINGLES } else { GROWTH }).max(slack);
    match new - old {
        more if more > most => Change::Grown,
        more if -more > most => Change::Shrunk,
        _ => Change::None,
    }
}

/// The file.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// All before the first table.
    head: String,
    rows: Vec<Row>,
}

/// Where the file is.
pub fn file() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/benches/FIGURES.md").into()
}

impl Figures {
    pub fn read() -> Result<Figures> {
        let path = file();
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Figures::parse(&text).with_context(|| format!("reading {}", path.display()))
    }

    pub fn write(&self) -> Result<()> {
        let path = file();
        std::fs::write(&path, self.render()).with_context(|| format!("writing {}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Figures> {
        let at = text.find(Table::ALL[0].title()).context("the first table's title is missing")?;
        let mut figures = Figures { head: text[..at].to_owned(), rows: Vec::new() };
        let mut table = None;
        for line in text[at..].lines() {
            if let Some(titled) = Table::ALL.into_iter().find(|table| table.title() == line) {
                table = Some(titled);
            } else if let Some(table) = table
                && line.starts_with('|')
                && line != table.head()
                && !line.starts_with("|--")
            {
                figures.rows.push(parse_row(table, line).with_context(|| format!("in the line {line:?}"))?);
            } else if !line.is_empty() && !line.starts_with("|") {
                bail!("{line:?} is no row of a table");
            }
        }
        Ok(figures)
    }

    pub fn render(&self) -> String {
        let tables = Table::ALL.map(|table| {
            let rule = table.head().split('|').map(|cell| "-".repeat(cell.len())).collect::<Vec<_>>().join("|");
            let rows = self.rows.iter().filter(|row| row.table == table).map(|row| {
                let ns = row.found.ns.map(|ns| format!("{ns:.0}")).unwrap_or_default();
                line([&row.place, &row.found.name, &table.text_of(row.found.value), &ns, &row.why], table) + "\n"
            });
            format!("{}\n\n{}\n{rule}\n{}", table.title(), table.head(), rows.collect::<String>())
        });
        self.head.clone() + &tables.join("\n")
    }

    fn row(&self, table: Table, place: &str, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.table == table && row.place == place && row.found.name == name)
    }

    /// Whether anything is on file for a kernel, or a processor and a kernel.
    pub fn knows(&self, table: Table, place: &str) -> bool {
        self.rows.iter().any(|row| row.table == table && row.place == place)
    }

    /// What has changed since the rows were written. `slack`: what any figure may differ by.
    pub fn compare(&self, table: Table, place: &str, found: &[Found], slack: f64) -> Vec<Difference> {
        let mut differences: Vec<_> = found.iter().map(|found| self.difference(table, place, found, slack)).collect();
        let theirs = self.rows.iter().filter(|row| row.table == table && row.place == place);
        let gone = theirs.filter(|row| !found.iter().any(|found| found.name == row.found.name));
        differences.extend(gone.map(|row| Difference {
            table,
            name: row.found.name.clone(),
            change: Change::Gone,
            old: Some(row.found.value),
            new: None,
        }));
        differences.retain(|difference| difference.change != Change::None);
        differences
    }

    fn difference(&self, table: Table, place: &str, found: &Found, slack: f64) -> Difference {
        let old = self.row(table, place, &found.name).map(|row| row.found.value);
        let is_known = self.rows.iter().any(|row| row.table == table && row.found.name == found.name);
        let new = if is_known { Change::Elsewhere } else { Change::New };
        let change = old.map_or(new, |old| change(&found.name, old, found.value, slack));
        Difference { table, name: found.name.clone(), change, old, new: Some(found.value) }
    }

    /// Writes down what was found at this place. Rows that have no more than a tenth of difference stay as they are,
    /// unless there is a reason for what has grown: then all are written. Without one, growth is refused and answered.
    pub fn record(
        &mut self,
        (table, place): (Table, &str),
        found: &[Found],
        slack: f64,
        why: Option<&str>,
        today: &str,
    ) -> Result<(), Vec<Difference>> {
        let differences = self.compare(table, place, found, slack);
        let grown = |name: &str| differences.iter().find(|d| d.change == Change::Grown && d.name == name);
        if why.is_none() && differences.iter().any(|difference| difference.change == Change::Grown) {
            return Err(differences.into_iter().filter(|difference| difference.change == Change::Grown).collect());
        }
        let rows: Vec<Row> = found
            .iter()
            .map(|found| {
                let fresh = |why| Row { table, place: place.to_owned(), found: found.clone(), why };
                let Some(old) = self.row(table, place, &found.name) else { return fresh(String::new()) };
                let was = || table.text_of(old.found.value);
                match (change(&found.name, old.found.value, found.value, slack), why) {
                    _ if grown(&found.name).is_some() => {
                        fresh(format!("{today}, was {}: {}", was(), why.unwrap_or_default()))
                    }
                    (Change::Shrunk, _) => fresh(String::new()),
                    (_, Some(_)) => fresh(old.why.clone()),
                    // Exact figures need no margin on the way down.
                    _ if table == Table::Instructions && found.value < old.found.value => fresh(old.why.clone()),
                    _ => old.clone(),
                }
            })
            .collect();
        let is_found = |name: &str| found.iter().any(|found| found.name == name);
        self.rows.retain(|row| {
            let is_alternative = ALTERNATIVES.contains(&row.found.name.as_str()) && !is_found(&row.found.name);
            row.table != table || row.place != place || is_alternative
        });
        self.rows.extend(rows);
        self.rows.sort_by_key(|row| (row.table == Table::Ways, version_key(&row.place)));
        Ok(())
    }

    /// Rows that say much more than `before`, without a reason of their own.
    pub fn unexplained(&self, before: &Figures) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| {
            let Some(old) = before.row(row.table, &row.place, &row.found.name) else { return false };
            // What one nanosecond is in references: the row itself says it, roughly.
            let slack = match row.found.ns {
                Some(ns) if ns > 0.0 => CLOCK_NS * row.found.value / ns,
                Some(_) => f64::INFINITY,
                None => 0.0,
            };
            let grown = change(&row.found.name, old.found.value, row.found.value, slack) == Change::Grown;
            grown && (row.why.is_empty() || row.why == old.why)
        });
        rows.map(|row| format!("{}, {}", row.place, row.found.name)).collect()
    }
}

/// "AMD EPYC 25.1.1, 6.18" sorts behind "AMD EPYC 25.1.1, 6.1", and before 7.0.
fn version_key(place: &str) -> (String, Vec<u32>) {
    let (before, version) = place.rsplit_once(' ').unwrap_or(("", place));
    (before.to_owned(), version.split('.').map(|number| number.parse().unwrap_or(0)).collect())
}

fn parse_row(table: Table, line: &str) -> Result<Row> {
    let inside = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|')).context("no row")?;
    let cells: Vec<&str> = inside.split('|').map(str::trim).collect();
    let (place, name, value, ns, why) = match (table, cells.as_slice()) {
        (Table::Instructions, &[place, name, value, why]) => (place, name, value, None, why),
        (Table::Ways, &[place, name, value, ns, why]) => (place, name, value, Some(ns), why),
        _ => bail!("{} cells", cells.len()),
    };
    let ns = ns.map(|ns| ns.parse().with_context(|| format!("{ns:?} is no number"))).transpose()?;
    let value = value.parse().with_context(|| format!("{value:?} is no number"))?;
    let found = Found { name: name.to_owned(), value, ns };
    Ok(Row { table, place: place.to_owned(), found, why: why.to_owned() })
}

/// A kernel's release line: "6.18" of "6.18.44-amd64".
pub fn release_line(release: &str) -> String {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    format!("{}.{}", numbers.next().unwrap_or("0"), numbers.next().unwrap_or("0"))
}
