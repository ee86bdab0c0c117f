//! The figures on file (benches/FIGURES.md): that growth is seen, and gets in with a reason only.

use std::process::Command;

use crate::laboratory::figures::{self, Change, Difference, Figures, Found, Table, release_line};
use crate::laboratory::skip;

const FILE: &str = "\
# A head

| that has | a table |

## Instructions that the verifier walks through

| kernel | program            | instructions | why more |
|--------|--------------------|--------------|----------|
| 5.10   | connect4           |         1000 | |
| 6.18   | connect4           |         2000 | |
| 6.18   | wire_in_ethernet   |         4000 | 2026-01-01, was 3000: it does more |

## Ways through the packet programs

| processor, kernel            | way                                                            | references |   ns | why more |
|------------------------------|----------------------------------------------------------------|------------|------|----------|
| A processor 1.2.3, 6.18      | to a local backend                                             |      1.000 |  200 | |
| A processor 1.2.3, 6.18      | unrelated                                                      |      0.010 |    2 | |
";
const MACHINE: &str = "A processor 1.2.3, 6.18";
/// Two nanoseconds of a reference of 200.
const GRAIN: f64 = 0.01;

fn file() -> Figures {
    Figures::parse(FILE).unwrap()
}

fn program(name: &str, value: f64) -> Found {
    Found { name: name.into(), value, ns: None }
}

fn way(name: &str, value: f64) -> Found {
    Found { name: name.into(), value, ns: Some(value * 200.0) }
}

fn programs(connect4: f64, wire_in: f64) -> [Found; 2] {
    [program("connect4", connect4), program("wire_in_ethernet", wire_in)]
}

#[test]
fn the_file_is_written_as_it_was_read() {
    assert_eq!(file().render(), FILE);
    let text = std::fs::read_to_string(figures::file()).unwrap();
    assert_eq!(Figures::read().unwrap().render(), text, "as `make bench-packets ARGS=--record` writes it");
}

#[test]
fn what_is_no_row_is_refused_with_its_line() {
    for (line, fault) in [
        ("| 6.18 | connect4 | 1 |", "3 cells"),
        ("| 6.18 | connect4 | many | |", "no number"),
        ("said in passing", "no row"),
    ] {
        let text = FILE.replace("| 5.10   | connect4           |         1000 | |", line);
        let error = format!("{:#}", Figures::parse(&text).unwrap_err());
        assert!(error.contains(fault) && error.contains(line), "{error}");
    }
    assert!(Figures::parse("# no table").is_err());
}

#[test]
fn eleven_percent_more_instructions_fail_and_nine_do_not() {
    let changes = |connect4: f64, wire_in: f64| {
        let differences = file().compare(Table::Instructions, "6.18", &programs(connect4, wire_in), 0.0);
        differences.into_iter().map(|d| (d.fails(), d.to_string())).collect::<Vec<_>>()
    };
    assert_eq!(changes(2000.0, 4000.0), []);
    assert_eq!(changes(2180.0, 4360.0), []);
    assert_eq!(changes(2220.0, 4360.0), [(true, "connect4: 2000 -> 2220 (+11.0 %)".into())]);
    assert_eq!(changes(1780.0, 3640.0), [(false, "connect4: 2000 -> 1780 (-11.0 %)".into())]);
}

#[test]
fn eleven_percent_more_time_fails_and_nine_or_what_the_clock_cannot_tell_does_not() {
    let fails = |local: f64, unrelated: f64| {
        let found = [way("to a local backend", local), way("unrelated", unrelated)];
        let differences = file().compare(Table::Ways, MACHINE, &found, GRAIN);
        differences.into_iter().filter(|d| d.fails()).map(|d| d.name).collect::<Vec<_>>()
    };
    assert_eq!(fails(1.09, 0.0199), [""; 0]);
    assert_eq!(fails(1.11, 0.0199), ["to a local backend"]);
    assert_eq!(fails(1.09, 0.0211), ["unrelated"]);
}

#[test]
fn a_first_packet_may_take_a_quarter_longer_and_no_third() {
    let name = "UDP IPv4 to a remote backend, proving the flow";
    let text = FILE.replace("to a local backend    ", &format!("{name} ")).replace("unrelated", "refused     ");
    let fails = |value: f64| {
        let differences = Figures::parse(&text).unwrap().compare(Table::Ways, MACHINE, &[way(name, value)], GRAIN);
        differences.iter().any(Difference::fails)
    };
    assert_eq!((fails(1.25), fails(1.33)), (false, true));
    assert!(
        figures::is_single("TCP IPv6 refused, no endpoint") && figures::is_single("TCP IPv4 to a local backend, first")
    );
    for other in ["TCP IPv4 to a local backend", "UDP IPv4 to a local backend, first piece of a datagram"] {
        assert!(!figures::is_single(other));
    }
}

#[test]
fn what_is_not_on_file_fails_and_what_is_gone_is_told() {
    let found = [program("connect4", 2000.0), program("connect6", 2000.0)];
    let differences = file().compare(Table::Instructions, "6.18", &found, 0.0);
    let changes: Vec<_> = differences.iter().map(|d| (d.name.as_str(), d.change, d.fails())).collect();
    assert_eq!(changes, [("connect6", Change::New, true), ("wire_in_ethernet", Change::Gone, false)]);

    let found = [program("wire_in_ethernet", 9000.0)];
    let differences = file().compare(Table::Instructions, "5.10", &found, 0.0);
    let changes: Vec<_> = differences.iter().map(|d| (d.name.as_str(), d.change, d.fails())).collect();
    assert_eq!(changes, [("wire_in_ethernet", Change::Elsewhere, false), ("connect4", Change::Gone, false)]);
}

#[test]
fn a_kernel_or_processor_that_is_not_on_file_is_known_as_such() {
    assert!(file().knows(Table::Instructions, "5.10") && file().knows(Table::Ways, MACHINE));
    assert!(!file().knows(Table::Instructions, "5.1") && !file().knows(Table::Ways, "6.18"));
    for (release, line) in [("6.18.44-fc", "6.18"), ("5.10.0-35-amd64", "5.10"), ("7.2-rc1", "7.2"), ("6", "6.0")] {
        assert_eq!(release_line(release), line);
    }
}

#[test]
fn growth_is_recorded_with_a_reason_only_and_the_reason_stays() {
    let mut figures = file();
    let place = (Table::Instructions, "6.18");
    let refused = figures.record(place, &programs(2201.0, 4000.0), 0.0, None, "2026-02-03").unwrap_err();
    assert_eq!(refused.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["connect4"]);
    assert_eq!(figures, file(), "nothing is written");

    figures.record(place, &programs(2201.0, 4100.0), 0.0, Some("services are counted"), "2026-02-03").unwrap();
    let text = figures.render();
    assert!(
        text.contains("| connect4           |         2201 | 2026-02-03, was 2000: services are counted |"),
        "{text}"
    );
    assert!(text.contains("|         4100 | 2026-01-01, was 3000: it does more |"), "{text}");
    figures.record(place, &programs(2201.0, 4100.0), 0.0, None, "2026-03-04").unwrap();
    assert_eq!(figures.render(), text);
}

#[test]
fn small_growths_add_up_against_a_row_and_what_shrinks_is_written() {
    let mut figures = file();
    let place = (Table::Instructions, "6.18");
    figures.record(place, &programs(2150.0, 4000.0), 0.0, None, "").unwrap();
    assert_eq!(figures, file(), "a row that has grown by less than a tenth stays");
    assert!(figures.record(place, &programs(2250.0, 4000.0), 0.0, None, "").is_err());
    figures.record(place, &programs(1990.0, 3000.0), 0.0, None, "").unwrap();
    let text = figures.render();
    assert!(text.contains("| connect4           |         1990 | |"), "{text}");
    assert!(text.contains("| wire_in_ethernet   |         3000 | |"), "what it was blamed for is gone: {text}");

    let both = |local| [way("to a local backend", local), way("unrelated", 0.01)];
    let mut figures = file();
    figures.record((Table::Ways, MACHINE), &both(0.95), GRAIN, None, "").unwrap();
    assert_eq!(figures, file(), "a lucky measurement of time is no new measure");
    figures.record((Table::Ways, MACHINE), &both(0.85), GRAIN, None, "").unwrap();
    assert!(figures.render().contains("|      0.850 |  170 | |"), "{}", figures.render());
}

#[test]
fn rows_of_new_and_lost_programs_come_and_go_and_kernels_are_in_order() {
    let mut figures = file();
    figures.record((Table::Instructions, "6.1"), &[program("connect4", 7.0)], 0.0, None, "").unwrap();
    figures.record((Table::Instructions, "6.18"), &[program("connect6", 8.0)], 0.0, None, "").unwrap();
    figures.record((Table::Instructions, "10.0"), &[program("connect4", 9.0)], 0.0, None, "").unwrap();
    let text = figures.render();
    let rows = text.lines().filter(|line| line.contains("connect")).collect::<Vec<_>>();
    let starts: Vec<String> = rows
        .iter()
        .map(|row| row.split('|').take(4).map(str::trim).collect::<Vec<_>>().join(" ").trim().into())
        .collect();
    assert_eq!(starts, ["5.10 connect4 1000", "6.1 connect4 7", "6.18 connect6 8", "10.0 connect4 9"]);
}

#[test]
fn a_row_that_is_raised_by_hand_must_say_why() {
    let raised = |from: &str, to: &str| {
        assert!(FILE.contains(from));
        Figures::parse(&FILE.replace(from, to)).unwrap().unexplained(&file())
    };
    assert_eq!(raised("        2000 | |", "        2180 | |"), [""; 0]);
    assert_eq!(raised("        2000 | |", "        2220 | |"), ["6.18, connect4"]);
    assert_eq!(raised("        2000 | |", "        2220 | because |"), [""; 0]);
    let old_reason = raised("        4000 | 2026-01-01", "        5000 | 2026-01-01");
    assert_eq!(old_reason, ["6.18, wire_in_ethernet"]);
    assert_eq!(raised("     1.000 |  200 |", "     1.200 |  240 |"), ["A processor 1.2.3, 6.18, to a local backend"]);
    assert_eq!(raised("     0.010 |    2 |", "     0.015 |    3 |"), [""; 0]);
}

/// A file of an earlier state of this tree; none where there is no git, or no such state.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// The file before its last change: the last commit's if it differs from that, else the one before the commit that
/// changed it last.
fn before_the_last_change(now: &Figures) -> Option<Figures> {
    const PATH: &str = "benches/FIGURES.md";
    let commits = git(&["log", "--format=%H", "--", PATH])?;
    let versions = commits.lines().filter_map(|commit| git(&["show", &format!("{commit}:{PATH}")]));
    let mut parsed = versions.filter_map(|text| Figures::parse(&text).ok());
    parsed.find(|version| version != now)
}

#[test]
fn the_last_change_of_the_file_gives_a_reason_for_what_it_raises() {
    let now = Figures::read().unwrap();
    let Some(before) = before_the_last_change(&now) else {
        skip("git does not know benches/FIGURES.md as it was before its last change");
        return;
    };
    assert_eq!(now.unexplained(&before), [""; 0], "their columns \"why more\" do not say what the change is for");
}
