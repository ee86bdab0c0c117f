//! The command line: parses it, runs the subcommand, and turns errors into messages and exit codes (1: it failed,
//! 2: it was asked for something it does not know).

mod address;
mod check;
mod config_file;
mod explain;
mod finding;
mod flags;
mod get;
mod host;
mod kube_proxy;
mod leftovers;
mod lenient_yaml;
mod log;
mod manual;
mod merge;
mod monitor;
mod outward;
mod pipe;
mod pods;
mod report;
mod run;
mod shadow;
mod source_check;
mod status;
mod table;
mod top;
mod trace;
mod traffic;
mod value;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::{ArgAction, CommandFactory as _, Parser as _};

use crate::abi::abi_version::ABI_VERSION;
use crate::bpf;
use crate::chain::chain;
use crate::escape;
use crate::explain::{DIRECTORY, sockets_path};
use crate::snapshot;
use flags::PinFlags;
pub use flags::{Cli, Command};

const USAGE_EXIT_CODE: u8 = 2;

/// A command line that cannot be meant: exit code 2, as clap's own errors.
#[derive(Debug)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for UsageError {}

/// The whole program. `started`: when the process did.
pub fn main(started: Instant) -> ExitCode {
    let result = match parse(std::env::args_os().collect()).unwrap_or_else(|error| error.exit()).command {
        Command::Run(flags) if flags.cleanup => cleanup(&flags.node.pins),
        Command::Run(flags) if flags.shadow.is_some() => match shadow::run(*flags, started) {
            Ok(false) => return ExitCode::FAILURE,
            result => result.map(drop),
        },
        Command::Run(flags) => run::run(*flags, started),
        Command::Check(flags) => match check::run(*flags) {
            Ok(false) => return ExitCode::FAILURE,
            result => result.map(drop),
        },
        Command::Get(flags) => get::run(&flags),
        Command::Report(flags) => report::run(*flags),
        Command::Completion(flags) => manual::completion(flags.shell),
        Command::Man(flags) => manual::man(&flags),
        Command::Explain(flags) => explain::run(&flags),
        Command::Trace(flags) => trace::run(&flags),
        Command::Top(flags) => top::run(&flags),
        Command::Monitor(flags) => monitor::run(&flags),
        Command::Cleanup(flags) => cleanup(&flags.pins),
        Command::Version => print(&format!("kubelane {} (map ABI {ABI_VERSION})\n", env!("CARGO_PKG_VERSION"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error);
            if error.is::<UsageError>() { ExitCode::from(USAGE_EXIT_CODE) } else { ExitCode::FAILURE }
        }
    }
}

/// The command line as it is meant; the first argument is the program's name.
///
/// # Errors
/// When it cannot be meant; also when it asks for help or the version, which clap counts among its errors.
pub fn parse(arguments: Vec<OsString>) -> Result<Cli, clap::Error> {
    let arguments = with_subcommand(arguments);
    let mut cli = Cli::try_parse_from(&arguments)?;
    if let Command::Run(flags) = &mut cli.command {
        flags.repeated = repeated(&arguments);
    }
    Ok(cli)
}

/// The flags of `run` of which one value counts and that are given more than once, each once: clap keeps the last.
fn repeated(arguments: &[OsString]) -> Vec<String> {
    let command = Cli::command();
    let of_run = command.find_subcommand("run").into_iter().flat_map(clap::Command::get_arguments);
    let single: Vec<&clap::Arg> = of_run.filter(|arg| !matches!(arg.get_action(), ArgAction::Append)).collect();
    let names = |arg: &clap::Arg, argument: &str| match argument.strip_prefix("--").map(split_value) {
        Some((name, _)) => {
            arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
        }
        None => argument.strip_prefix('-').is_some_and(|short| arg.get_short() == short.chars().next()),
    };
    let flags = arguments.iter().skip(2).filter_map(|argument| argument.to_str()).filter(|text| text.len() > 1);
    let flags: Vec<&str> = flags.filter(|text| text.starts_with('-')).collect();
    let is_repeated = |arg: &&clap::Arg| flags.iter().filter(|flag| names(arg, flag)).count() > 1;
    single.into_iter().filter(is_repeated).filter_map(|arg| Some(format!("--{}", arg.get_long()?))).collect()
}

/// kube-proxy has no subcommands: flags alone mean `run`. Nor does it tell --log_dir from --log-dir.
fn with_subcommand(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let first = arguments.get(1).map(|first| first.to_string_lossy());
    let own = ["-h", "--help", "-V", "--version"];
    if first.is_some_and(|first| first.starts_with('-') && !own.contains(&&*first)) {
        arguments.insert(1, "run".into());
    }
    let is_run = arguments.get(1).is_some_and(|first| first == "run");
    for argument in arguments.iter_mut().filter(|_| is_run) {
        if let Some((name, value)) = argument.to_str().and_then(|text| text.strip_prefix("--")).map(split_value) {
            *argument = format!("--{}{value}", name.replace('_', "-")).into();
        }
    }
    arguments
}

/// A flag's name, and its value with the equals sign.
fn split_value(flag: &str) -> (&str, &str) {
    flag.split_at(flag.find('=').unwrap_or(flag.len()))
}

/// Once the log is set up, the reason of the end belongs there, in its format.
fn tell(error: &anyhow::Error) {
    let mut text = chain(error.as_ref());
    if was_refused(&text) && !nix::unistd::geteuid().is_root() {
        text.push_str(" (this process is not root)");
    }
    if tracing::dispatcher::has_been_set() {
        tracing::error!("{text}");
    } else {
        // A terminal that has gone takes no words any more.
        let _ = writeln!(io::stderr(), "error: {}", escape::lines(&text));
    }
}

/// Whether the kernel refused something, EPERM or EACCES: by its words, because a library may have wrapped the error.
fn was_refused(text: &str) -> bool {
    ["(os error 1)", "(os error 13)", "EPERM", "EACCES"].iter().any(|refusal| text.contains(refusal))
}

fn cleanup(pins: &PinFlags) -> anyhow::Result<()> {
    let pin_path = &pins.pin_path;
    // It is found by the pin directory, which is about to go.
    let socket = sockets_path(pin_path);
    let bpf::Cleanup { mut removed, connections, rest } = bpf::cleanup(pin_path)?;
    if let Some(socket) = socket.ok().filter(|socket| std::fs::remove_file(socket).is_ok()) {
        removed.push(socket.display().to_string());
        // Other daemons may have theirs there.
        let _ = std::fs::remove_dir(DIRECTORY);
    }
    let mut text = match connections {
        Ok(connections) => connections.to_string(),
        Err(error) => format!("connections that came in through this node's addresses for Services end: {error:#}\n"),
    };
    text.extend(removed.iter().map(|what| format!("removed {what}\n")));
    text += &match removed.len() {
        n if rest.is_err() => format!("{n} removed: kubelane's programs are detached, but something is left\n"),
        0 => format!("nothing to remove: no kubelane state below {}\n", pin_path.display()),
        n => format!("{n} removed: kubelane is gone from {}\n", pin_path.display()),
    };
    if leftovers::routes_loopback() {
        text += &format!("{}; {}\n", leftovers::LOOPBACK_IS_ROUTED, leftovers::LOOPBACK_REMEDY);
    }
    print(&text)?;
    rest
}

/// YAML; JSON, which is YAML, too, where there are characters that only its strings can name.
fn yaml(value: &impl serde::Serialize) -> anyhow::Result<String> {
    match escape::is_plain_json(&serde_json::to_string(value)?) {
        true => serde_norway::to_string(value).context("writing YAML"),
        false => Ok(serde_json::to_string_pretty(value)? + "\n"),
    }
}

/// Writes to standard output, without what a terminal would act upon. That nobody reads on (a pager that was quit, `head`)
/// is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(escape::lines(text).as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_without_a_subcommand_mean_run() {
        let table = [
            ("kubelane --config=/c --hostname-override=n", "kubelane run --config=/c --hostname-override=n"),
            ("kubelane -v=2", "kubelane run -v=2"),
            ("kubelane run --log_dir=/a_b", "kubelane run --log-dir=/a_b"),
            ("kubelane get services --pin_path x", "kubelane get services --pin_path x"),
            ("kubelane get services -o wide", "kubelane get services -o wide"),
            ("kubelane --help", "kubelane --help"),
            ("kubelane -V", "kubelane -V"),
            ("kubelane", "kubelane"),
        ];
        for (given, expected) in table {
            let arguments = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(with_subcommand(arguments(given)), arguments(expected), "{given}");
        }
    }

    #[test]
    fn of_a_flag_given_twice_the_last_one_counts_and_it_is_named() {
        let parse = |text: &str| match parse(format!("kubelane {text}").split(' ').map(OsString::from).collect()) {
            Ok(Cli { command: Command::Run(flags) }) => *flags,
            other => panic!("{text}: {other:?}"),
        };
        for (given, repeated) in [
            ("--source dir:/x --kubeconfig /k", &[][..]),
            ("run --hostname-override=a --hostname_override b", &["--hostname-override"]),
            ("--source dir:/x -v=1 --v 3 -v4", &["--v"]),
            ("--log-format json --logging-format=text", &["--log-format"]),
            (
                "--destroy-tcp-sockets --destroy-tcp-sockets --conntrack-tcp-be-liberal --conntrack-tcp-be-liberal=false",
                &["--conntrack-tcp-be-liberal", "--destroy-tcp-sockets"],
            ),
            (
                "--nodeport-addresses=10.0.0.0/8 --nodeport-addresses=fd00::/8 --proxy-mode=ipvs --proxy-mode=iptables",
                &[],
            ),
            ("--oom-score-adj -5 --iptables-masquerade-bit -5", &[]),
        ] {
            assert_eq!(parse(given).repeated, repeated, "{given}");
        }
        let last = parse("--max-services=1 --max-services=2 -v=1 -v=3 --cleanup --cleanup=false");
        assert_eq!((last.max_services, last.log.verbosity, last.cleanup), (2, Some(3), false));
    }

    #[test]
    fn a_refusal_of_the_kernel_is_recognised_however_it_is_wrapped() {
        for (number, refused) in
            [(libc::EPERM, true), (libc::EACCES, true), (libc::ENOENT, false), (libc::EINTR, false)]
        {
            let error = anyhow::Error::new(io::Error::from_raw_os_error(number)).context("cannot open it");
            assert_eq!(was_refused(&chain(error.as_ref())), refused, "{error:#}");
        }
        assert!(was_refused(&nix::errno::Errno::EPERM.to_string()));
    }
}
