//! `kubelane report`: one archive with what a bug report needs. What cannot be had is said in its place, and keeps nothing
//! else out.

mod redact;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;

use super::flags::ReportFlags;
use super::get::Output;
use super::snapshot::Snapshot;
use super::status::Status;
use super::{check, escape, host};
use crate::abi::abi_version::ABI_VERSION;
use crate::bpf::{self, Maps};
use crate::chain::chain;
use crate::explain::{About, Answer, ask};
use redact::Redactor;

/// Sysctls that decide about packets from outside.
const SYSCTLS: [&str; 8] = [
    "net/ipv4/ip_local_port_range",
    "net/ipv4/conf/all/forwarding",
    "net/ipv6/conf/all/forwarding",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv4/conf/all/route_localnet",
    "net/core/optmem_max",
    "kernel/unprivileged_bpf_disabled",
];

/// Writes the archive, and says where.
///
/// # Errors
/// When it cannot be written.
pub fn run(flags: ReportFlags) -> Result<()> {
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let stamp = jiff::Timestamp::from_second(i64::try_from(time)?)?.strftime("%Y%m%dT%H%M%SZ").to_string();
    let mut parts = collect(&flags);
    let mut node = host::node_name(None).unwrap_or_else(|_| "node".to_owned());
    if flags.redact {
        redact(&mut parts, &mut node, &flags.check.node.pins.pin_path);
    }
    let name = format!("kubelane-report-{}-{stamp}", file_name(&node));
    let path = flags.output.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    if path == Path::new("-") {
        return match archive(io::stdout().lock(), &name, &parts, time) {
            Err(error) if is_closed(&error) => Ok(()),
            result => result,
        };
    }
    // Never over a file that is there, nor through a link that somebody has put there.
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot create {}", path.display()))?;
    let written = archive(file, &name, &parts, time).with_context(|| format!("writing {}", path.display()));
    if written.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    written?;
    super::print(&format!("{}: {} files; look through them before you send them\n", path.display(), parts.len()))
}

fn is_closed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// What may stand in a file's name.
fn file_name(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    text.chars().map(|c| if is_plain(c) { c } else { '_' }).take(64).collect()
}

/// A file's name and text.
type Part = (&'static str, String);

fn collect(flags: &ReportFlags) -> Vec<Part> {
    let pins = &flags.check.node.pins.pin_path;
    let snapshot = || Snapshot::read(&mut Maps::open(pins)?);
    let daemon = ask(pins, About::Daemon);
    let known = daemon.as_ref().ok().and_then(Option::as_ref);
    let of_daemon = |read: fn(&Answer) -> String| match (&daemon, known) {
        (_, Some(answer)) => Ok(read(answer)),
        (Err(error), _) => Err(anyhow::anyhow!("{}", chain(error.as_ref()))),
        _ => Err(anyhow::anyhow!("no daemon answers")),
    };
    vec![
        ("version.txt", version()),
        ("check.txt", or_why(check::text(flags.check.clone()).map(|(text, _)| text))),
        ("status.json", or_why(Status::read(pins).and_then(|status| status.render(Some(&Output::Json))))),
        ("services.json", or_why(snapshot().and_then(|all| json(&all.frontends())))),
        ("backends.json", or_why(snapshot().and_then(|all| json(&all.backends())))),
        ("attachments.json", or_why(bpf::attachments(pins).and_then(|all| json(&all)))),
        ("daemon.json", or_why(of_daemon(|answer| json(&answer.daemon).unwrap_or_default()))),
        ("arguments.txt", or_why(of_daemon(|answer| lines(&without_passwords(&answer.arguments))))),
        ("warnings.txt", or_why(of_daemon(|answer| lines(&answer.warnings)))),
        ("log.txt", or_why(of_daemon(|answer| lines(&answer.log)))),
        ("metrics.txt", or_why(metrics(pins))),
        ("sysctls.txt", sysctls()),
        ("counters.txt", or_why(counters(pins, flags.seconds))),
    ]
}

fn or_why(part: Result<String>) -> String {
    part.unwrap_or_else(|error| format!("This could not be collected: {}\n", chain(error.as_ref())))
}

fn json(what: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(what)? + "\n")
}

fn lines(all: &[String]) -> String {
    all.iter().fold(String::new(), |text, line| text + line + "\n")
}

/// URLs may have a user and a password.
fn without_passwords(arguments: &[String]) -> Vec<String> {
    let strip = |argument: &String| match argument.split_once("://") {
        Some((scheme, rest)) => match rest.split_once('@') {
            Some((_, host)) => format!("{scheme}://{host}"),
            None => argument.clone(),
        },
        None => argument.clone(),
    };
    arguments.iter().map(strip).collect()
}

fn version() -> String {
    let mut text = format!("kubelane {} (map ABI {ABI_VERSION})\n", env!("CARGO_PKG_VERSION"));
    let kernel = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let system = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let system = system.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("unknown");
    let _ = write!(text, "{}\nsystem: {}\n", kernel.trim(), system.trim_matches('"'));
    let _ = writeln!(text, "processors: {}", host::processors());
    text
}

fn metrics(pins: &Path) -> Result<String> {
    let answer = ask(pins, About::Metrics)?.context("no daemon answers")?;
    Ok(answer.metrics)
}

fn sysctls() -> String {
    let read = |name: &&str| {
        let value = std::fs::read_to_string(Path::new("/proc/sys").join(name));
        format!(
            "{} = {}\n",
            name.replace('/', "."),
            value.map_or_else(|error| error.to_string(), |v| v.trim().to_owned())
        )
    };
    SYSCTLS.iter().map(read).collect()
}

/// Each counter, and what it grew by a second.
fn counters(pins: &Path, seconds: u16) -> Result<String> {
    let maps = Maps::open(pins)?;
    let before = maps.read_counters()?;
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = maps.read_counters()?;
    let mut text = format!("{:<32}{:>16}{:>16}\n", "COUNTER", "TOTAL", "PER SECOND");
    for ((label, before), (_, after)) in before.into_iter().zip(after) {
        let rate = after.saturating_sub(before) as f64 / f64::from(seconds);
        let _ = writeln!(text, "{label:<32}{after:>16}{rate:>16.1}");
    }
    Ok(text)
}

fn redact(parts: &mut [Part], node: &mut String, pins: &Path) {
    let mut redactor = Redactor::default();
    redactor.learn("node", node);
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    redactor.learn("node", hostname.trim());
    if let Ok(Some(answer)) = ask(pins, About::Daemon) {
        redactor.learn("node", &answer.daemon.node);
        answer.daemon.zone.iter().for_each(|zone| redactor.learn("zone", zone));
    }
    let all = Maps::open(pins).and_then(|mut maps| Snapshot::read(&mut maps));
    for frontend in all.iter().flat_map(Snapshot::frontends) {
        redactor.learn("namespace", &frontend.service.namespace);
        redactor.learn("name", &frontend.service.name);
        redactor.learn("port", &frontend.service.port_name);
    }
    parts.iter().for_each(|(_, text)| redactor.learn_from(text));
    for (_, text) in parts.iter_mut() {
        *text = redactor.text(text);
    }
    *node = redactor.text(node);
}

fn archive(out: impl Write, name: &str, parts: &[Part], time: u64) -> Result<()> {
    let mut tar = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    for (file, text) in parts {
        let text = escape::lines(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(time);
        tar.append_data(&mut header, format!("{name}/{file}"), text.as_bytes())?;
    }
    tar.into_inner()?.finish()?.flush()?;
    Ok(())
}
