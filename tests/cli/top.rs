//! `kubelane top` in a pseudo-terminal, beside real traffic: what it shows is what there is, whatever the terminal, the
//! names and the daemon are like; and what it costs.

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::eventually;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind;
use crate::terminal::Terminal;
use kubelane::abi::ServiceName;
use kubelane::bpf::{Maps, pinned};
use kubelane::sync::{MapIo as _, MapName};
use serde_json::json;

const WIDE: (u16, u16) = (120, 40);
const NODE_PORT: &str = "172.31.0.11:30010";
const ENTER: &str = "\r";
const ESCAPE: &str = "\x1b";

fn top_with(node: &Node, size: (u16, u16), more: &[&str], variables: &[(&str, &str)]) -> Terminal {
    let pins = node.pin_path.display().to_string();
    let arguments = [&["top", "--interval", "1", "--pin-path", &pins], more].concat();
    Terminal::start(env!("CARGO_BIN_EXE_kubelane"), &arguments, size, variables)
}

fn top(node: &Node, size: (u16, u16)) -> Terminal {
    top_with(node, size, &[], &[])
}

/// Services in several situations, one of them with a NodePort.
fn situations(cluster: &Cluster) {
    let ready = |pods: &[&str]| cluster.ready(pods);
    cluster.put("busy", 10, json!({}), &ready(&["a", "b"]));
    cluster.put("empty", 11, json!({}), &cluster.endpoints(Endpoint::unready, &["b"]));
    cluster.put("near", 12, json!({"spec": {"internalTrafficPolicy": "Local"}}), &ready(&["a", "b"]));
    let mut tcp = port("tcp", "TCP", 90);
    tcp["nodePort"] = json!(30010);
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with("outer", 13, json!([tcp]), changes, &[("tcp", "TCP", 9000)], &ready(&["a"]));
}

fn start(cluster: &Cluster) -> Daemon<'_> {
    let manifests = &cluster.manifests.dir;
    Daemon::start_with(&cluster.lab, "node1", manifests, &["--service-metrics", "50", "--service-traffic"])
        .expect("the daemon starts")
}

/// The line of a Service port.
fn line<'a>(screen: &'a str, name: &str) -> &'a str {
    screen.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("no {name} in\n{screen}"))
}

fn order(screen: &str) -> Vec<&str> {
    let is_service = |line: &&str| line.starts_with("default/");
    screen.lines().filter(is_service).map(|line| line.split(' ').next().unwrap_or_default()).collect()
}

#[test]
fn services_are_shown_with_their_connections_and_what_is_refused() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = start(&cluster);
    let outside: SocketAddr = NODE_PORT.parse().unwrap();
    let connected = cluster.lab.outside(|| Ok(std::net::TcpStream::connect(outside)?)).unwrap();
    let mut terminal = top(cluster.lab.node("node1"), WIDE);
    let screen = terminal.wait_for_text("default/outer:tcp");
    for expected in ["running", "4 Services", "services", "maps", "REFUSED, DROPPED", "BACKENDS", "ADDRESS"] {
        assert!(screen.contains(expected), "{expected} is not in\n{screen}");
    }
    assert!(line(&screen, "empty:tcp").contains("refused"), "{screen}");
    assert!(line(&screen, "outer:tcp").contains("10.96.0.13:90/TCP +"), "{screen}");
    assert!(line(&screen, "outer:tcp").contains("ClusterIP,NodePort"), "{screen}");
    // Connections come, and the busiest Service is the first.
    let mut client = cluster.client("client");
    let (busy, empty) = (vip(10, 90)[0], vip(11, 90)[0]);
    terminal.press("ss");
    terminal.wait_for_text("by open");
    terminal.press("ss");
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        client.ask(Kind::Tcp4, busy, 20);
        client.ask(Kind::Tcp4, empty, 20);
        let screen = terminal.screen();
        let rate = |line: &str| line.split_whitespace().nth(1).and_then(|rate| rate.parse::<f64>().ok());
        let is_refused =
            screen.lines().any(|line| line.contains("refused: no usable endpoint") && !line.starts_with("      0.0"));
        if screen.contains("by new")
            && order(&screen).first() == Some(&"default/busy:tcp")
            && rate(line(&screen, "busy:tcp")).is_some_and(|rate| rate > 0.0)
            && rate(line(&screen, "outer:tcp")) == Some(0.0)
            && screen.contains("BYTES/S")
            && line(&screen, "busy:tcp").contains("B ")
            && !line(&screen, "busy:tcp").contains(" 0 B ")
            && is_refused
        {
            break;
        }
        assert!(Instant::now() < until, "{screen}");
    }
    // A connection from outside is open.
    let screen = terminal.wait_for("an open connection", |screen| {
        screen.contains("OPEN") && line(screen, "outer:tcp").split_whitespace().nth(2) == Some("1")
    });
    assert_eq!(line(&screen, "busy:tcp").split_whitespace().nth(2), Some("-"), "{screen}");
    println!("{screen}");
    terminal.press(ENTER);
    let screen = terminal.wait_for_text("ms to connect on average of");
    assert!(screen.contains("default/busy:tcp: ") && screen.contains("B since the daemon started"), "{screen}");
    drop(connected);
    terminal.press("q");
    assert!(terminal.wait().success());
    assert!(!terminal.is_taken_over());
}

#[test]
fn a_service_is_opened_with_its_backends_and_why_others_get_nothing() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = start(&cluster);
    let node = cluster.lab.node("node1");
    let mut terminal = top(node, WIDE);
    terminal.wait_for_text("default/near:tcp");
    terminal.press("/near");
    let screen = terminal.wait_for("near alone", |screen| order(screen).iter().all(|name| name.contains("near")));
    assert!(screen.contains("/near_"), "{screen}");
    terminal.press(ENTER);
    terminal.wait_for_text("/ near");
    terminal.press(ENTER);
    let screen = terminal.wait_for_text("out: on another node");
    let (a, b) = (cluster.lab.pod("a").v4, cluster.lab.pod("b").v4);
    assert!(line(&screen, &format!("{a}:")).contains("100.0%"), "{screen}");
    assert!(line(&screen, &format!("{b}:")).contains("out: on another node"), "{screen}");
    assert!(screen.contains("internalTrafficPolicy is Local"), "{screen}");
    println!("{screen}");
    // What changes is followed.
    cluster.put("near", 12, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["b"]));
    terminal.wait_for_text("no endpoint of default/near is on this node");
    // Further down, and back.
    terminal.press("\x1b[6~");
    terminal.press("G");
    terminal.press(ESCAPE);
    terminal.wait_for_text("Enter open");
    terminal.press(ESCAPE);
    terminal.wait_for_text("default/busy:tcp");
    terminal.press("/nothing has this name");
    terminal.wait_for_text("no Service has this");
    terminal.press(ESCAPE);
    terminal.wait_for_text("default/busy:tcp");
    // While it is paused nothing is asked for: what comes is not shown until it goes on.
    terminal.press("p");
    terminal.wait_for_text("PAUSED");
    cluster.put("late", 20, json!({}), &cluster.ready(&["a"]));
    assert!(eventually(Duration::from_secs(20), || {
        node.get("services", &[]).is_ok_and(|text| text.contains("late"))
    }));
    std::thread::sleep(Duration::from_secs(2));
    assert!(!terminal.screen().contains("late"), "{}", terminal.screen());
    terminal.press("p");
    terminal.wait_for_text("default/late:tcp");
    terminal.press("\x03");
    assert!(terminal.wait().success(), "Ctrl-C");
}

#[test]
fn a_terminal_of_any_size_shows_what_fits() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = start(&cluster);
    let mut terminal = top(cluster.lab.node("node1"), (20, 6));
    let screen = terminal.wait_for_text("SERVICE");
    assert!(screen.lines().all(|line| line.chars().count() <= 20), "{screen}");
    assert!(screen.contains("default/busy"), "{screen}");
    for (size, expected) in [
        ((1, 1), ""),
        ((20, 2), "default/"),
        ((300, 100), "KIND"),
        ((45, 12), "BACKENDS"),
        ((80, 24), "ADDRESS"),
        ((20, 24), "REFUSED"),
    ] {
        terminal.resize(size.0, size.1);
        terminal.wait_for(expected, |screen| {
            let is_whole = screen.lines().count() <= usize::from(size.1);
            is_whole && (screen.contains(expected) || (size.1 == 2 && screen.contains("kubelane")))
        });
    }
    terminal.press(ENTER);
    let screen = terminal.wait_for_text("10.96.0.10");
    assert!(screen.lines().all(|line| line.chars().count() <= 20), "{screen}");
    terminal.press("q");
    assert!(terminal.wait().success());
}

/// Whether any colour was ever set.
fn has_colour(bytes: &str) -> bool {
    let sequences = bytes.split("\x1b[").skip(1).filter_map(|rest| rest.split_once('m'));
    let codes = sequences.map(|(codes, _)| codes).filter(|codes| codes.chars().all(|c| c.is_ascii_digit() || c == ';'));
    let is_colour = |code: &str| matches!(code.parse(), Ok(30..=38 | 40..=48 | 90..=97 | 100..=107));
    codes.flat_map(|codes| codes.split(';').take(1)).any(is_colour)
}

#[test]
fn there_is_no_colour_where_it_is_not_wanted() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = start(&cluster);
    for (options, variables, expected) in [
        (&[][..], &[][..], true),
        (&[], &[("NO_COLOR", "1")][..], false),
        (&[], &[("NO_COLOR", "")], true),
        (&[], &[("TERM", "dumb")], false),
        (&["--color", "never"], &[], false),
        (&["--color=always"], &[("NO_COLOR", "1")], true),
    ] {
        let mut terminal = top_with(cluster.lab.node("node1"), WIDE, options, variables);
        terminal.wait_for_text("default/busy:tcp");
        terminal.press("q");
        assert!(terminal.wait().success());
        assert_eq!(has_colour(&terminal.bytes()), expected, "{options:?} {variables:?}");
    }
}

#[test]
fn without_a_daemon_the_maps_are_shown_and_what_is_not_known_is_left_out() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = start(&cluster);
    let node = cluster.lab.node("node1");
    let mut terminal = top(node, WIDE);
    terminal.wait_for_text("running");
    daemon.kill();
    let screen = terminal.wait_for_text("no daemon answers");
    assert!(
        screen.contains("default/busy:tcp") && !screen.contains("NEW/S") && !screen.contains("watches"),
        "{screen}"
    );
    terminal.press(ENTER);
    terminal.wait_for_text("this is from the maps alone, which lack some reasons");
    terminal.press(ESCAPE);
    let again = start(&cluster);
    terminal.wait_for_text("running");
    again.terminate().unwrap();
    node.cleanup().unwrap();
    terminal.wait_for_text("no kubelane state below");
    terminal.press("q");
    assert!(terminal.wait().success());
}

/// How `kubelane top` ends in a terminal, and what it said.
fn ends(mut terminal: Terminal) -> (Option<i32>, String) {
    (terminal.wait().code(), terminal.screen().replace('\n', " "))
}

#[test]
fn what_keeps_it_from_its_work_is_said_where_it_stays_to_be_read() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = start(&cluster);
    let node = cluster.lab.node("node1");
    let pins = node.pin_path.display().to_string();
    // No terminal: a pipe.
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    let output = command.args(["top", "--pin-path", &pins]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{:?}", output.stdout);
    assert!(said.contains("are no terminal") && said.contains("kubelane get services"), "{said}");
    // No permission.
    let asked = ["--reuid=65534", "--clear-groups", env!("CARGO_BIN_EXE_kubelane"), "top", "--pin-path", &pins];
    let copy = std::env::temp_dir().join(format!("kubelane-top-{}", std::process::id()));
    fs::copy(asked[2], &copy).unwrap();
    let copied = copy.display().to_string();
    let asked = [asked[0], asked[1], &copied, asked[3], asked[4], asked[5]];
    let (code, said) = ends(Terminal::start("setpriv", &asked, WIDE, &[]));
    fs::remove_file(copy).unwrap();
    assert!(code == Some(1) && said.contains("not root"), "{code:?} {said}");
    // Another version's state, and none.
    daemon.terminate().unwrap();
    let own = pinned::abi_directory(&node.pin_path);
    let other = node.pin_path.join("v999");
    fs::rename(&own, &other).unwrap();
    let (code, said) = ends(top(node, WIDE));
    fs::rename(&other, &own).unwrap();
    assert!(code == Some(1) && said.contains("map ABI v999") && said.contains("use the binary of"), "{code:?} {said}");
    node.cleanup().unwrap();
    let (code, said) = ends(top(node, WIDE));
    assert!(code == Some(1) && said.contains("no kubelane state below"), "{code:?} {said}");
}

#[test]
fn names_that_a_terminal_would_act_upon_are_shown_as_their_codes() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    start(&cluster).kill();
    let node = cluster.lab.node("node1");
    let mut maps = Maps::open(&node.pin_path).unwrap();
    let mut ids = Vec::new();
    maps.dump(MapName::Services, &mut |id, _| ids.push(id.to_vec())).unwrap();
    let hostile = ServiceName::new(&format!("ev\x1b[2Jil/\u{202e}{}\n:\u{9b}p\u{200f}", "w".repeat(240)));
    ids.iter().for_each(|id| assert!(maps.write(MapName::Services, id, bytemuck::bytes_of(&hostile), 1).is_empty()));
    let mut terminal = top(node, (250, 30));
    let screen = terminal.wait_for_text("ev\\u001b[2Jil/\\u202ewww");
    assert!(screen.contains("kubelane"), "{screen}");
    terminal.press(ENTER);
    terminal.wait_for_text("next: ");
    terminal.press(ESCAPE);
    terminal.wait_for_text("Enter open");
    terminal.press("/\u{202e}\u{7}ev");
    terminal.wait_for_text("/\\u202eev_");
    terminal.press(ESCAPE);
    terminal.wait_for_text("/ filter");
    terminal.press("q");
    assert!(terminal.wait().success());
    let bytes = terminal.bytes();
    assert!(!bytes.contains(['\u{202e}', '\u{200f}', '\u{9b}', '\u{7}']), "{bytes:?}");
    assert!(!bytes.contains("\x1b[2Jil"), "{bytes:?}");
}

#[test]
fn it_ends_with_its_terminal_and_leaves_it_in_order_when_it_is_ended() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = start(&cluster);
    let mut closed = top(cluster.lab.node("node1"), WIDE);
    closed.wait_for_text("default/busy:tcp");
    closed.hang_up();
    assert!(!closed.wait().success());
    // And so without the signal.
    let pins = cluster.lab.node("node1").pin_path.display().to_string();
    let arguments = ["--ignore-signal=HUP", env!("CARGO_BIN_EXE_kubelane"), "top", "--pin-path", &pins];
    let mut closed = Terminal::start("env", &arguments, WIDE, &[]);
    closed.wait_for_text("default/busy:tcp");
    closed.hang_up();
    let status = closed.wait();
    assert_eq!(status.code(), Some(1), "{status}");
    let mut ended = top(cluster.lab.node("node1"), WIDE);
    ended.wait_for_text("default/busy:tcp");
    assert!(ended.is_taken_over());
    let pid = nix::unistd::Pid::from_raw(ended.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(ended.wait().success());
    assert!(!ended.is_taken_over());
}

/// Processor time of a process, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn what_it_costs_is_bounded_and_nothing_while_it_is_paused() {
    let Some(cluster) = Cluster::or_skip() else { return };
    (0..200).for_each(|n| cluster.put(&format!("service-{n}"), n, json!({}), &cluster.ready(&["a", "b"])));
    let daemon = start(&cluster);
    let mut terminal = top(cluster.lab.node("node1"), WIDE);
    terminal.wait_for_text("default/service-0:tcp");
    let spent = |seconds: u64| {
        let before = (ticks(terminal.pid()), ticks(daemon.pid()));
        std::thread::sleep(Duration::from_secs(seconds));
        (ticks(terminal.pid()) - before.0, ticks(daemon.pid()) - before.1)
    };
    let (own, daemons) = spent(10);
    println!("top of 800 Service ports, looking once a second for 10 s: {own} ticks of 10 ms; the daemon {daemons}");
    // Without optimisation, and looking twice as often as it does by itself.
    assert!(own <= 100 && daemons <= 50, "{own} and {daemons} ticks of 10 ms in 10 s");
    terminal.press("p");
    terminal.wait_for_text("PAUSED");
    let before = ticks(terminal.pid());
    std::thread::sleep(Duration::from_secs(5));
    assert!(ticks(terminal.pid()) - before <= 1, "a paused page costs nothing");
}
