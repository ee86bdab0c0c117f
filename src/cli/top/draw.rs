//! How the page is laid out. What does not fit is left out from the least important on.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, Wrap};

use super::app::App;
use super::detail;
use super::theme::Theme;
use crate::escape;
use crate::overview::{Flows, MapFill, Measures, Order, Overview, PortTraffic, Row as Port, Verdict, Watch};

/// From this height on the page has its head whole, and lines for what is refused and dropped.
const TALL: u16 = 18;
const MEDIUM: u16 = 10;
/// Up to this height there is a list, and neither its heads nor the keys.
const SHORT: u16 = 3;
/// Below this width totals are left out.
const NARROW: u16 = 50;
/// Reasons of refusals and drops that are shown.
const REASONS: usize = 6;
/// A map that is as full as this is somebody's concern.
const FULL: f64 = 0.9;
/// One that is less full is left out.
const SLIGHT: f64 = 0.01;

pub fn draw(frame: &mut Frame, app: &mut App, theme: &Theme) {
    let area = frame.area();
    let head = head(app, theme, area);
    let reasons = if app.service.is_none() { reasons(app.overview.as_ref(), theme, area) } else { Vec::new() };
    let rows = |lines: &[Line]| Constraint::Length(u16::try_from(lines.len()).unwrap_or(0));
    let keys = u16::from(area.height > SHORT);
    let parts = [rows(&head), rows(&reasons), Constraint::Min(1), Constraint::Length(keys)];
    let [top, middle, body, foot] = Layout::vertical(parts).areas(area);
    frame.render_widget(Paragraph::new(head), top);
    frame.render_widget(Paragraph::new(reasons), middle);
    match app.service {
        Some(_) => service(frame, app, theme, body),
        None => list(frame, app, theme, body),
    }
    frame.render_widget(footer(app, theme), foot);
}

/// Parts of a line, two blanks apart.
fn joined(parts: Vec<Span<'static>>) -> Line<'static> {
    let mut line = Line::default();
    for part in parts {
        if !line.spans.is_empty() {
            line.spans.push(Span::raw("  "));
        }
        line.spans.push(part);
    }
    line
}

fn head(app: &App, theme: &Theme, area: Rect) -> Vec<Line<'static>> {
    let measures = app.overview.as_ref().and_then(|overview| overview.measures.as_ref());
    let mut lines = vec![joined(daemon(app, measures, theme))];
    if let Some(trouble) = &app.trouble {
        lines.push(Line::styled(escape::line(trouble), theme.bad()));
    }
    if let Some(measures) = measures.filter(|_| area.height >= MEDIUM) {
        lines.push(joined(watches(measures, theme)));
    }
    if let Some(measures) = measures.filter(|_| area.height >= TALL) {
        lines.push(joined(maps(&measures.maps, theme)));
        lines.push(joined(flows(measures, theme)));
    }
    lines
}

fn daemon(app: &App, measures: Option<&Measures>, theme: &Theme) -> Vec<Span<'static>> {
    let mut parts = vec![Span::styled("kubelane", theme.head())];
    if app.is_paused {
        parts.push(Span::styled("PAUSED", theme.selected()));
    }
    let Some(measures) = measures else {
        if app.overview.is_some() && app.trouble.is_none() {
            parts.push(Span::styled("no daemon answers: this is from the maps alone", theme.bad()));
        }
        return parts;
    };
    parts.push(match (measures.last_sync_seconds, measures.pending) {
        (None, _) => Span::styled("starting", theme.bad()),
        (Some(_), 0) => Span::raw("running"),
        (Some(_), pending) => Span::styled(format!("{pending} changes wait"), theme.bad()),
    });
    parts.extend(measures.last_sync_seconds.map(|age| Span::raw(format!("last sync {} ago", seconds(age)))));
    parts.push(Span::raw(format!("{} Services", measures.services)));
    for (count, what) in [(measures.degraded, "over quota"), (measures.warnings, "warnings")] {
        if count > 0 {
            parts.push(Span::styled(format!("{count} {what}"), theme.bad()));
        }
    }
    if !measures.unserved.is_empty() {
        let reasons = escape::line(&measures.unserved.join(", "));
        parts.push(Span::styled(format!("not served: {reasons}"), theme.bad()));
    }
    parts.push(Span::styled(escape::line(&measures.release), theme.soft()));
    parts
}

fn watches(measures: &Measures, theme: &Theme) -> Vec<Span<'static>> {
    let watch = |watch: &Watch| {
        let kind = escape::line(&watch.kind);
        let age = watch.event_seconds.map_or_else(|| "never".to_owned(), |age| format!("{} ago", seconds(age)));
        match watch.is_connected {
            true => Span::raw(format!("{kind} {age}")),
            false => Span::styled(format!("{kind} DISCONNECTED, {} errors", watch.errors), theme.bad()),
        }
    };
    let all = measures.watches.iter().map(watch);
    std::iter::once(Span::styled("watches", theme.head())).chain(all).collect()
}

fn maps(maps: &[MapFill], theme: &Theme) -> Vec<Span<'static>> {
    let fill = |map: &MapFill| {
        let text = format!("{} {:.0}%", escape::line(&map.name), map.share() * 100.0);
        if map.share() >= FULL { Span::styled(text, theme.bad()) } else { Span::raw(text) }
    };
    let used: Vec<Span> = maps.iter().filter(|map| map.share() >= SLIGHT).map(fill).collect();
    let none = Some(Span::raw("all less than 1% full")).filter(|_| used.is_empty());
    std::iter::once(Span::styled("maps", theme.head())).chain(used).chain(none).collect()
}

fn flows(measures: &Measures, theme: &Theme) -> Vec<Span<'static>> {
    let state = |flows: &Flows| Span::raw(escape::line(&format!("{} {} {}", flows.count, flows.protocol, flows.state)));
    let all: Vec<Span> = measures.flows.iter().map(state).collect();
    let none = Some(Span::raw("no packets of Services are followed")).filter(|_| all.is_empty());
    std::iter::once(Span::styled("flows", theme.head())).chain(all).chain(none).collect()
}

/// What is refused and dropped: the most of it first.
fn reasons(overview: Option<&Overview>, theme: &Theme, area: Rect) -> Vec<Line<'static>> {
    let room = match area.height {
        TALL.. => REASONS,
        MEDIUM.. => 2,
        _ => return Vec::new(),
    };
    let all = overview.iter().flat_map(|overview| &overview.verdicts);
    let mut some: Vec<&Verdict> = all.filter(|verdict| verdict.total > 0).collect();
    some.sort_by(|a, b| b.rate.unwrap_or(0.0).total_cmp(&a.rate.unwrap_or(0.0)).then(b.total.cmp(&a.total)));
    let text = |rate: &str, total: &str, words: &str| match area.width {
        ..NARROW => format!("{rate:>7} {words}"),
        _ => format!("{rate:>9} {total:>12}  {words}"),
    };
    let line = |verdict: &&Verdict| {
        let rate = verdict.rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
        let text = text(&rate, &verdict.total.to_string(), verdict.meaning);
        let is_now = verdict.rate.is_some_and(|rate| rate > 0.0);
        if is_now { Line::styled(text, theme.bad()) } else { Line::raw(text) }
    };
    let mut lines = vec![Line::styled(text("PER SEC", "TOTAL", "REFUSED, DROPPED"), theme.head())];
    lines.extend(some.iter().take(room).map(line));
    match some.len() {
        0 => lines.push(Line::raw("nothing has been refused or dropped")),
        n if n > room => lines.push(Line::styled(format!("and {} reasons more", n - room), theme.soft())),
        _ => {}
    }
    lines
}

/// A column of the list.
struct Column {
    head: &'static str,
    width: Constraint,
    /// Of the terminal, for the column to be shown.
    least: u16,
    is_known: fn(&Overview) -> bool,
    cell: fn(&Port<'_>) -> String,
}

const COLUMNS: [Column; 7] = [
    Column {
        head: "SERVICE",
        width: Constraint::Fill(3),
        least: 0,
        is_known: |_| true,
        cell: |row| escape::line(&row.port.full_name),
    },
    Column {
        head: "NEW/S",
        width: Constraint::Length(8),
        least: 28,
        is_known: Overview::counts_connections,
        cell: |row| row.rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}")),
    },
    Column {
        head: "OPEN",
        width: Constraint::Length(8),
        least: 36,
        is_known: |overview| !overview.open.is_empty(),
        cell: |row| row.open.map_or_else(|| "-".to_owned(), |count| count.to_string()),
    },
    Column {
        head: "BACKENDS",
        width: Constraint::Length(8),
        least: 44,
        is_known: |_| true,
        cell: |row| match row.port.endpoints {
            0 => row.port.when_empty.to_owned(),
            count => count.to_string(),
        },
    },
    Column {
        head: "BYTES/S",
        width: Constraint::Length(8),
        least: 54,
        is_known: Overview::counts_traffic,
        cell: |row| row.bytes.map_or_else(|| "-".to_owned(), bytes),
    },
    Column {
        head: "ADDRESS",
        width: Constraint::Fill(2),
        least: 70,
        is_known: |_| true,
        cell: |row| match row.port.more_addresses {
            0 => format!("{}/{}", row.port.address, row.port.protocol),
            more => format!("{}/{} +{more}", row.port.address, row.port.protocol),
        },
    },
    Column {
        head: "KIND",
        width: Constraint::Fill(2),
        least: 100,
        is_known: |_| true,
        cell: |row| row.port.kinds.join(","),
    },
];

fn list(frame: &mut Frame, app: &mut App, theme: &Theme, area: Rect) {
    let Some(overview) = app.overview.take() else {
        return frame.render_widget(Paragraph::new("looking"), area);
    };
    let rows = app.rows(&overview);
    let has_heads = frame.area().height > SHORT;
    let room = usize::from(area.height.saturating_sub(u16::from(has_heads)));
    app.page = room;
    let first = app.cursor.saturating_sub(room / 2).min(rows.len().saturating_sub(room));
    let is_shown = |column: &&Column| area.width >= column.least && (column.is_known)(&overview);
    let columns: Vec<&Column> = COLUMNS.iter().filter(is_shown).collect();
    let shown = rows.iter().enumerate().skip(first).take(room).map(|(at, port)| {
        let row = Row::new(columns.iter().map(|column| Cell::new((column.cell)(port))));
        if at == app.cursor { row.style(theme.selected()) } else { row }
    });
    let heads = Row::new(columns.iter().map(|column| Cell::new(column.head))).style(theme.head());
    let table = Table::new(shown, columns.iter().map(|column| column.width));
    frame.render_widget(if has_heads { table.header(heads) } else { table }, area);
    if rows.is_empty() {
        let below = Rect { y: area.y.saturating_add(1), height: area.height.saturating_sub(1), ..area };
        let text = if app.filter.is_empty() { "no Services" } else { "no Service has this: Esc shows all" };
        frame.render_widget(Paragraph::new(text), below);
    }
    app.overview = Some(overview);
}

fn service(frame: &mut Frame, app: &mut App, theme: &Theme, area: Rect) {
    let Some((namespace, name)) = &app.service else { return };
    let title = Line::styled(escape::line(&format!("{namespace}/{name}")), theme.selected());
    let mut lines = vec![title];
    let measures = app.overview.as_ref().and_then(|overview| overview.measures.as_ref());
    lines.extend(traffic(measures, namespace, name));
    let open = app.overview.as_ref().map(|overview| overview.open.clone()).unwrap_or_default();
    match &app.detail {
        None => lines.push(Line::raw("asking")),
        Some(Err(error)) => lines.push(Line::styled(escape::line(error), theme.bad())),
        Some(Ok(explanation)) => lines.extend(detail::lines(explanation, &open, theme)),
    }
    // As many as they are when they are wrapped, or one or two less.
    let width = usize::from(area.width.max(1));
    let count: usize = lines.iter().map(|line| line.width().div_ceil(width).max(1)).sum();
    app.page = usize::from(area.height);
    app.scroll = app.scroll.min(count.saturating_sub(1));
    let scroll = (u16::try_from(app.scroll).unwrap_or(u16::MAX), 0);
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).scroll(scroll), area);
}

/// What the Service's ports have moved, where that is measured.
fn traffic(measures: Option<&Measures>, namespace: &str, name: &str) -> Vec<Line<'static>> {
    let full = format!("{namespace}/{name}");
    let all = measures.and_then(|measures| measures.traffic.as_ref()).into_iter().flatten();
    let of_service = |(port, traffic): (&'_ String, &PortTraffic)| {
        let rest = port.strip_prefix(&full)?;
        (rest.is_empty() || rest.starts_with(':')).then(|| (port.clone(), *traffic))
    };
    let mut ports: Vec<(String, PortTraffic)> = all.filter_map(of_service).collect();
    ports.sort_by(|a, b| a.0.cmp(&b.0));
    let line = |(port, traffic): (String, PortTraffic)| {
        let mut text = format!("{}: {} since the daemon started", escape::line(&port), bytes(traffic.bytes));
        if traffic.connects > 0.0 {
            let milliseconds = traffic.connect_seconds / traffic.connects * 1e3;
            text += &format!(", {milliseconds:.2} ms to connect on average of {}", traffic.connects);
        }
        if traffic.connects_failed > 0.0 {
            text += &format!(", {} never connected", traffic.connects_failed);
        }
        Line::raw(text)
    };
    ports.into_iter().map(line).collect()
}

/// "999 B", "1.0 kB", "12.3 MB".
fn bytes(count: f64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000.0 {
        return format!("{count:.0} B");
    }
    let mut value = count / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn footer(app: &App, theme: &Theme) -> Paragraph<'static> {
    if app.is_typing {
        return Paragraph::new(Line::raw(format!("/{}_", escape::line(&app.filter))));
    }
    let keys = match &app.service {
        Some(_) => "Esc back  ↑↓ move  p pause  q quit".to_owned(),
        None => {
            let order = match app.order {
                Order::Name => "name",
                Order::New => "new",
                Order::Open => "open",
            };
            let filter = if app.filter.is_empty() { "filter".to_owned() } else { escape::line(&app.filter) };
            format!("q quit  / {filter}  s by {order}  Enter open  p pause")
        }
    };
    Paragraph::new(Line::styled(keys, theme.soft()))
}

fn seconds(age: u64) -> String {
    match age {
        0..120 => format!("{age} s"),
        120..7200 => format!("{} min", age / 60),
        _ => format!("{} h", age / 3600),
    }
}
