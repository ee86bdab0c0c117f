//! Nanoseconds that a packet costs, by BPF_PROG_TEST_RUN on one core, for each way through the packet programs, and
//! what the verifier says of all programs. Needs root.
//!
//!     make bench-packets                          prints; ARGS="egress remote": only ways that have one of these words
//!     make check-figures                          compares with benches/FIGURES.md, and fails when something has grown
//!     make bench-packets ARGS="--record"          writes what has not grown to benches/FIGURES.md
//!     make bench-packets ARGS="--record --why 'services are counted now'"    and what has

#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;

mod established;
mod first;
mod guests;
mod machine;
mod measure;
mod taken;
mod ways;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Parser;

use laboratory::figures::{Change, Difference, Figures, Found, Table};
use taken::Taken;

#[derive(Parser)]
struct Arguments {
    /// Takes only ways that have one of these words in their names [default: all].
    words: Vec<String>,
    /// Compares with the file, and fails when something has grown by more than a tenth, or what a first packet costs by three.
    #[arg(long, conflicts_with = "record")]
    check: bool,
    /// Writes this machine's rows of the file. Those that differ by no more than that stay as they are.
    #[arg(long, conflicts_with = "words")]
    record: bool,
    /// Writes the rows of the kernels of the last `make test-vm` as well, by what its logs say: verifiers only.
    #[arg(long, requires = "record")]
    guests: bool,
    /// Why something costs more now; is written to the rows that have grown, and all rows are written.
    #[arg(long, requires = "record")]
    why: Option<String>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Measurements on fresh nodes that a figure on file is the lowest of.
const RECORDED_OF: usize = 5;
/// For how long a way that seems to have grown is measured again, and how much longer each further take is. The lowest
/// time of each program counts, here as on file. Beside a busy neighbour, which may last for many seconds, the reference
/// takes 1.2 times as long but the shortest ways 1.6 times: only takes of an undisturbed moment can be compared, and all
/// that has truly grown stays grown.
const PATIENCE: Duration = Duration::from_secs(60);
const LONGER: usize = 2;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Err(reason) = laboratory::preflight() {
        ensure!(arguments.check, reason);
        laboratory::skip(&format!("figures of the programs: {reason:#}"));
        return Ok(());
    }
    machine::stay_on_this_processor()?;
    if arguments.check {
        check(&arguments.words)
    } else if arguments.record {
        record(arguments.guests, arguments.why.as_deref())
    } else {
        print(&arguments.words)
    }
}

fn print(words: &[String]) -> Result<()> {
    for found in taken::programs()? {
        if is_chosen(&found.name, words) {
            println!("{:<64} {:>6} instructions verified", found.name, found.value);
        }
    }
    let taken = Taken::new(|name| is_chosen(name, words))?;
    for found in taken.found() {
        println!("{:<64} {:>6.0} ns {:>7.3} references", found.name, found.ns.unwrap_or_default(), found.value);
    }
    println!("{:<64} {:>6.0} ns", "(a reference)", taken.reference_ns());
    Ok(())
}

fn is_chosen(name: &str, words: &[String]) -> bool {
    words.is_empty() || words.iter().any(|word| name.contains(word))
}

fn check(words: &[String]) -> Result<()> {
    let (figures, mut skipped, mut failed, mut compared) = (Figures::read()?, 0, 0, 0);
    let mut tell = |differences: &[Difference]| {
        for difference in differences {
            failed += usize::from(difference.fails());
            println!("{}", sentence(difference));
        }
    };
    let mut skip = |place: &str| {
        laboratory::skip(&format!("nothing is on file for {place}; `make bench-packets ARGS=--record` writes it"));
        skipped += 1;
    };
    let kernel = machine::kernel()?;
    if figures.knows(Table::Instructions, &kernel) {
        let found = taken::programs()?;
        compared += found.len();
        tell(&figures.compare(Table::Instructions, &kernel, &found, 0.0));
    } else {
        skip(&format!("the verifier of Linux {kernel}"));
    }
    let place = machine::processor_and_kernel()?;
    if figures.knows(Table::Ways, &place) {
        let (found, differences) = compare_ways(&figures, &place, words)?;
        compared += found.len();
        tell(&differences);
    } else {
        skip(&format!("packets on {place}"));
    }
    println!("Figures: {compared} compared, {failed} FAILED; {skipped} of 2 comparisons skipped.");
    if failed > 0 {
        bail!(
            "what has grown by more than a tenth (a first packet: three), or is not on file, must not go in without a word: make bench-packets ARGS=\"--record --why '...'\" writes it to {}, with the reason",
            laboratory::figures::file().display()
        );
    }
    Ok(())
}

fn sentence(difference: &Difference) -> String {
    match difference.change {
        Change::Shrunk => format!("better {difference}: record it, or it may grow back unseen"),
        Change::Elsewhere => format!("new    {difference}: record it"),
        Change::Gone => format!("gone   {difference}: record without it"),
        _ => format!("FAILED {difference}"),
    }
}

fn compare_ways(figures: &Figures, place: &str, words: &[String]) -> Result<(Vec<Found>, Vec<Difference>)> {
    let mut taken = Taken::new(|name| is_chosen(name, words))?;
    doubt(figures, place, &mut taken)?;
    let mut differences = figures.compare(Table::Ways, place, &taken.found(), taken.grain());
    differences.retain(|difference| is_chosen(&difference.name, words));
    Ok((taken.found(), differences))
}

/// What seems to have grown is measured again, on fresh nodes: where the kernel puts programs and rows makes a few
/// percent of difference, and neighbours may make more.
fn doubt(figures: &Figures, place: &str, taken: &mut Taken) -> Result<()> {
    let (began, mut told) = (Instant::now(), Vec::new());
    while began.elapsed() < PATIENCE {
        let mut differences = figures.compare(Table::Ways, place, &taken.found(), taken.grain());
        differences.retain(|difference| difference.change == Change::Grown);
        let grown: Vec<String> = differences.into_iter().map(|difference| difference.name).collect();
        if grown.is_empty() {
            break;
        }
        if grown != told {
            println!("again, for they seem to have grown: {}", grown.join("; "));
        }
        taken.again(|name| grown.iter().any(|grown| grown == name), LONGER)?;
        told = grown;
    }
    Ok(())
}

fn record(guests: bool, why: Option<&str>) -> Result<()> {
    if let Some(why) = why {
        ensure!(!why.trim().is_empty() && !why.contains(['|', '\n']), "--why takes a line without | in it");
    }
    let before = Figures::read()?;
    let mut figures = before.clone();
    let today = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
    let mut refused = Vec::new();
    let mut put =
        |table, place: &str, found: &[Found], slack| match figures.record((table, place), found, slack, why, &today) {
            Ok(()) => println!("{place}: {} figures", found.len()),
            Err(grown) => refused.extend(grown.iter().map(|grown| format!("{place}: {grown}"))),
        };
    put(Table::Instructions, &machine::kernel()?, &taken::programs()?, 0.0);
    if guests {
        for (kernel, found) in guests::programs()? {
            put(Table::Instructions, &kernel, &found, 0.0);
        }
    }
    let mut taken = Taken::new(|_| true)?;
    for _ in 1..RECORDED_OF {
        taken.again(|_| true, 1)?;
    }
    let place = machine::processor_and_kernel()?;
    doubt(&before, &place, &mut taken)?;
    put(Table::Ways, &place, &taken.found(), taken.grain());
    if !refused.is_empty() {
        bail!("these have grown, and --why does not say why; nothing is written:\n{}", refused.join("\n"));
    }
    figures.write()
}
