//! The page on the metrics port, in a real browser: it shows what there is and follows it, by keyboard, in light and dark and
//! at 320 pixels; no name is taken for markup; and readers that do not read hold nothing and delay nobody.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::browser::Browser;
use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind;
use crate::laboratory::{eventually, skip};
use kubelane::abi::ServiceName;
use kubelane::bpf::Maps;
use kubelane::sync::{MapIo as _, MapName};
use serde_json::{Value, json};

const METRICS: &str = "127.0.0.1:10249";
const ADDRESS: &str = "http://127.0.0.1:10249/";

fn situations(cluster: &Cluster) {
    cluster.put("busy", 10, json!({}), &cluster.ready(&["a", "b", "c"]));
    cluster.put("empty", 11, json!({}), &cluster.endpoints(Endpoint::unready, &["b"]));
    cluster.put("near", 12, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["a", "b"]));
    let mut tcp = port("tcp", "TCP", 90);
    tcp["nodePort"] = json!(30010);
    let changes = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}});
    cluster.put_with("outer", 13, json!([tcp]), changes, &[("tcp", "TCP", 9000)], &cluster.ready(&["a", "b"]));
}

fn start<'a>(cluster: &'a Cluster, more: &[&str]) -> Daemon<'a> {
    let options = [&["--service-metrics", "50"], more].concat();
    Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, &options).expect("the daemon starts")
}

/// A laboratory and a browser; `None`, said aloud, where one of them is not to be had.
fn cluster_and_browser() -> Option<(Cluster, (PathBuf, PathBuf))> {
    let cluster = Cluster::or_skip()?;
    match crate::browser::find() {
        Ok(found) => Some((cluster, found)),
        Err(reason) => {
            skip(&format!("{reason:#}"));
            None
        }
    }
}

fn open(cluster: &Cluster, found: &(PathBuf, PathBuf), width: u32) -> Browser {
    let mut browser = Browser::start(&cluster.lab.node("node1").host, found).unwrap();
    browser.open(ADDRESS, width).unwrap();
    browser.wait_for("document.getElementById('status')?.textContent.startsWith('live')").unwrap();
    browser
}

/// The texts of the first cells of a table.
fn first_cells(browser: &mut Browser, table: &str) -> Vec<String> {
    let cells =
        format!("[...document.querySelectorAll('#{table} > tr > td:first-child')].map((cell) => cell.textContent)");
    serde_json::from_value(browser.value(&cells).unwrap()).unwrap()
}

#[test]
fn services_refusals_maps_and_watches_are_shown_and_followed() {
    let Some((cluster, found)) = cluster_and_browser() else { return };
    situations(&cluster);
    let daemon = start(&cluster, &[]);
    let mut browser = open(&cluster, &found, 1200);
    let shown = first_cells(&mut browser, "services");
    assert!(shown.contains(&"default/busy:tcp".to_owned()) && shown.len() == 13, "{shown:?}");
    assert!(first_cells(&mut browser, "maps").contains(&"frontends".to_owned()));
    assert_eq!(first_cells(&mut browser, "watches"), ["endpointslices", "nodes", "services"]);
    browser.wait_for_text("connected").unwrap();
    // What is refused comes up, and so do rates.
    let mut client = cluster.client("client");
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        client.ask(Kind::Tcp4, vip(10, 90)[0], 30);
        client.ask(Kind::Tcp4, vip(11, 90)[0], 30);
        let rated = "[...document.querySelectorAll('#services > tr')].some((row) => row.textContent.includes('busy:tcp') && \
                     Number(row.children[4]?.textContent) > 0)";
        let drawn = "document.getElementById('refused').getAttribute('points').split(' ').length > 3";
        if browser.value(rated).unwrap() == true && browser.value(drawn).unwrap() == true {
            break;
        }
        assert!(Instant::now() < until, "{}", browser.text().unwrap());
    }
    browser.wait_for_text("refused: no usable endpoint anywhere").unwrap();
    browser.value("document.getElementById('order').value = 'new', document.getElementById('order').dispatchEvent(new Event('change'))").unwrap();
    browser.wait_for("document.querySelector('#services > tr')?.textContent.includes('busy:tcp')").unwrap();
    browser.prefer("light").unwrap();
    browser.screenshot("page-light").unwrap();
    browser.prefer("dark").unwrap();
    let ground = browser.value("getComputedStyle(document.body).backgroundColor").unwrap();
    assert_eq!(ground, "rgb(20, 24, 29)", "dark where that is preferred");
    browser.screenshot("page-dark").unwrap();
    // A Service that comes is shown without being asked for; a daemon that goes is told, and the next one answers.
    cluster.put("late", 20, json!({}), &cluster.ready(&["a"]));
    browser.wait_for_text("default/late:tcp").unwrap();
    daemon.kill();
    browser.wait_for_text("the daemon does not answer").unwrap();
    let _again = start(&cluster, &[]);
    browser.wait_for("document.getElementById('status')?.textContent.startsWith('live')").unwrap();
    let complaints: Vec<&String> = browser.complaints.iter().filter(|text| !text.contains("net::ERR")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn a_keyboard_is_enough_to_find_a_service_and_why_its_endpoints_are_in_or_out() {
    let Some((cluster, found)) = cluster_and_browser() else { return };
    situations(&cluster);
    let _daemon = start(&cluster, &[]);
    let mut browser = open(&cluster, &found, 1200);
    browser.press("/").unwrap();
    browser.write("outer").unwrap();
    browser.wait_for("document.querySelectorAll('#services > tr').length === 1").unwrap();
    browser.press("Tab").unwrap();
    browser.press("Tab").unwrap();
    assert_eq!(browser.value("document.activeElement.textContent").unwrap(), "default/outer:tcp");
    // Rows that are renewed keep the focus.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(browser.value("document.activeElement.textContent").unwrap(), "default/outer:tcp");
    browser.press("Enter").unwrap();
    let (a, b) = (cluster.lab.pod("a").v4, cluster.lab.pod("b").v4);
    let row = |pod: &str| {
        format!(
            "[...document.querySelectorAll('#detail td')].find((cell) => cell.textContent === '{pod}:9000')?.parentElement.innerText ?? ''"
        )
    };
    browser.wait_for(&format!("({}).includes('in, 50%')", row(&a.to_string()))).unwrap();
    let told = browser.value(&row(&b.to_string())).unwrap();
    assert!(
        told.as_str().unwrap().contains("in, 50%") && told.as_str().unwrap().contains("out: on another node"),
        "{told}"
    );
    browser.wait_for_text("port 30010 of this node, IPv4 (NodePort): Cluster set, from outside Local set").unwrap();
    browser.screenshot("page-service").unwrap();
    // A change is followed while it is looked at.
    cluster.put(
        "outer",
        13,
        json!({"spec": {"internalTrafficPolicy": "Cluster"}}),
        &cluster.endpoints(Endpoint::unready, &["a"]),
    );
    browser.wait_for("document.querySelector('#detail').innerText.includes('out: not ready')").unwrap();
    browser.press("Escape").unwrap();
    browser.wait_for("document.getElementById('detail').hidden").unwrap();
    assert_eq!(browser.value("document.activeElement.tagName").unwrap(), "BUTTON", "the focus is where it was");
    browser.press("p").unwrap();
    browser.wait_for("document.getElementById('status').textContent === 'paused'").unwrap();
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn a_screen_of_320_pixels_is_wide_enough_whatever_the_names_are() {
    let Some((cluster, found)) = cluster_and_browser() else { return };
    situations(&cluster);
    let daemon = start(&cluster, &[]);
    let node = cluster.lab.node("node1");
    let mut browser = open(&cluster, &found, 320);
    let is_narrow = "document.documentElement.scrollWidth <= 320";
    assert_eq!(browser.value(is_narrow).unwrap(), true);
    browser.value("location.hash = encodeURIComponent('default/outer')").unwrap();
    browser.wait_for_text("out: on another node").unwrap();
    assert_eq!(browser.value(is_narrow).unwrap(), true, "with a Service open");
    browser.screenshot("page-narrow").unwrap();
    browser.value("location.hash = ''").unwrap();
    // Names that would be markup, turn the line over, or never end.
    let mut maps = Maps::open(&node.pin_path).unwrap();
    let mut ids = Vec::new();
    maps.dump(MapName::Services, &mut |id, _| ids.push(id.to_vec())).unwrap();
    let names = [
        "<img src=x onerror=\"window.hacked=1\">/<script>window.hacked=1</script>:a".to_owned(),
        format!("ev\x1b[2Jil/\u{202e}{}\n:\u{9b}p\u{200f}", "w".repeat(240)),
        "'\"</td></table></bdi>&lt;b&gt;/x:${1}\u{2028}data: x".to_owned(),
    ];
    for (id, name) in ids.iter().zip(names.iter().cycle()) {
        let row = ServiceName::new(name);
        assert!(maps.write(MapName::Services, id, bytemuck::bytes_of(&row), 1).is_empty());
    }
    browser.wait_for_text("\\u202ewwww").unwrap();
    browser.wait_for_text("<script>window.hacked=1</script>").unwrap();
    browser.wait_for_text("'\"</td></table></bdi>&lt;b&gt;/x:${1}\\u2028data: x").unwrap();
    browser.screenshot("page-hostile").unwrap();
    let count = "document.querySelectorAll('img, script:not([type=module]), b').length";
    assert_eq!(browser.value(count).unwrap(), 0);
    assert_eq!(browser.value("window.hacked === undefined").unwrap(), true);
    assert_eq!(browser.value(is_narrow).unwrap(), true, "with hostile names");
    assert_eq!(browser.value("/[\\u0000-\\u0009\\u000b-\\u001f\\u007f-\\u009f\\u200b-\\u200f\\u2028-\\u202e]/.test(document.body.innerText.replaceAll('\\t', ''))").unwrap(), false);
    // And opened: the daemon knows none of them.
    browser.value("document.querySelector('#services button').click()").unwrap();
    browser.wait_for_text("the daemon knows no Service of this name").unwrap();
    assert_eq!(browser.value(is_narrow).unwrap(), true);
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    daemon.terminate().unwrap();
}

/// A viewer that speaks HTTP by itself.
fn viewer(daemon: &Daemon, query: &str) -> TcpStream {
    daemon
        .node
        .host
        .inside(|| {
            let mut stream = TcpStream::connect(METRICS)?;
            write!(stream, "GET /page/events?{query} HTTP/1.1\r\nHost: {METRICS}\r\n\r\n")?;
            Ok(stream)
        })
        .unwrap()
}

/// Waits for an event of this kind: its data.
fn event(reader: &mut BufReader<TcpStream>, kind: &str) -> Value {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream has ended");
        if line.trim_end() == format!("event: {kind}") {
            line.clear();
            reader.read_line(&mut line).unwrap();
            return serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
        }
    }
}

fn resident_kilobytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time of a process, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn viewers_who_do_not_read_hold_little_and_delay_nobody() {
    let Some(cluster) = Cluster::or_skip() else { return };
    (0..100).for_each(|n| cluster.put(&format!("service-{n}"), n, json!({}), &cluster.ready(&["a", "b", "c"])));
    let daemon = start(&cluster, &[]);
    let mut reader = BufReader::new(viewer(&daemon, "service=default/service-7"));
    let first = event(&mut reader, "state");
    assert_eq!((&first["services"]["total"], first["services"]["rows"].as_array().unwrap().len()), (&json!(400), 100));
    assert_eq!(first["detail"]["isKnown"], true);
    drop(reader);
    let before = resident_kilobytes(daemon.pid());
    // As many as may be connected, and more.
    let silent: Vec<TcpStream> = (0..200).map(|_| viewer(&daemon, "service=default/service-7")).collect();
    std::thread::sleep(Duration::from_secs(10));
    let mut reader = BufReader::new(viewer(&daemon, ""));
    let mut last = Instant::now();
    for _ in 0..4 {
        event(&mut reader, "state");
        assert!(last.elapsed() < Duration::from_secs(4), "{:?}", last.elapsed());
        last = Instant::now();
    }
    let grown = resident_kilobytes(daemon.pid()).saturating_sub(before);
    println!("200 viewers who do not read: {grown} kB");
    assert!(grown < 20_000, "{grown} kB");
    assert!(daemon.health("/livez").unwrap().starts_with("HTTP/1.1 200"));
    // The worker is as quick as without them.
    cluster.put("late", 200, json!({}), &cluster.ready(&["a"]));
    cluster.wait_for_backend(cluster.lab.pod("a").v4.into(), true);
    drop((silent, reader));
    // And when all have gone, nothing is done for anybody.
    std::thread::sleep(Duration::from_secs(3));
    let before = ticks(daemon.pid());
    std::thread::sleep(Duration::from_secs(10));
    let idle = ticks(daemon.pid()) - before;
    let mut reader = BufReader::new(viewer(&daemon, ""));
    event(&mut reader, "state");
    let before = ticks(daemon.pid());
    (0..5).for_each(|_| drop(event(&mut reader, "state")));
    let looked_at = ticks(daemon.pid()) - before;
    println!("400 Service ports: {idle} ticks of 10 ms in 10 s without a viewer, {looked_at} with one");
    // Without optimisation.
    assert!(looked_at <= idle + 50, "{looked_at} ticks of 10 ms, {idle} without a viewer");
}

#[test]
fn the_page_is_served_where_the_flag_says_and_to_the_nodes_own_names() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let ask = |daemon: &Daemon, host: &str| -> String {
        daemon
            .node
            .host
            .inside(|| {
                let mut stream = TcpStream::connect(METRICS)?;
                write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            })
            .unwrap()
    };
    let everywhere = ["--metrics-bind-address", "0.0.0.0:10249"];
    for (options, status) in [
        (&[][..], 200),
        (&["--metrics-page", "never"], 404),
        (&everywhere, 404),
        (&[everywhere[0], everywhere[1], "--metrics-page", "always"], 200),
    ] {
        let daemon = start(&cluster, options);
        assert!(eventually(PATIENCE, || daemon.metrics().is_ok()));
        let answer = ask(&daemon, METRICS);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{options:?}: {answer}");
        assert_eq!(answer.contains("content-security-policy: default-src 'none'"), status == 200, "{answer}");
        if options.is_empty() {
            assert!(ask(&daemon, "evil.example").starts_with("HTTP/1.1 421"));
        }
        daemon.terminate().unwrap();
    }
}
