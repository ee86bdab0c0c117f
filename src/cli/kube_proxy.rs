//! kube-proxy's flags that have no meaning here: accepted, so that its arguments can stay as they are, checked, and
//! named in one warning. Their names are those of kube-proxy 1.36.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::value::{LOCAL_MODES, MODES, Sort};

/// Name and sort. By subject; the last ones are its logging library's.
const FLAGS: [(&str, Sort); 42] = [
    ("feature-gates", Sort::Gates),
    ("kube-api-content-type", Sort::Text),
    ("kube-api-burst", Sort::Number),
    ("kube-api-qps", Sort::Number),
    ("profiling", Sort::Bool),
    ("show-hidden-metrics-for-version", Sort::Text),
    ("proxy-mode", MODES),
    ("iptables-masquerade-bit", Sort::Number),
    ("iptables-localhost-nodeports", Sort::Bool),
    ("iptables-sync-period", Sort::Duration),
    ("iptables-min-sync-period", Sort::Duration),
    ("ipvs-sync-period", Sort::Duration),
    ("ipvs-min-sync-period", Sort::Duration),
    ("ipvs-scheduler", Sort::Text),
    ("ipvs-exclude-cidrs", Sort::Cidrs),
    ("ipvs-strict-arp", Sort::Bool),
    ("ipvs-tcp-timeout", Sort::Duration),
    ("ipvs-tcpfin-timeout", Sort::Duration),
    ("ipvs-udp-timeout", Sort::Duration),
    ("detect-local-mode", LOCAL_MODES),
    ("pod-bridge-interface", Sort::Text),
    ("pod-interface-name-prefix", Sort::Text),
    ("cluster-cidr", Sort::Cidrs),
    ("config-sync-period", Sort::Duration),
    ("proxy-port-range", Sort::Text),
    ("vmodule", Sort::Text),
    ("log-flush-frequency", Sort::Duration),
    ("log-json-info-buffer-size", Sort::Text),
    ("log-json-split-stream", Sort::Bool),
    ("log-text-info-buffer-size", Sort::Text),
    ("log-text-split-stream", Sort::Bool),
    ("add-dir-header", Sort::Bool),
    ("alsologtostderr", Sort::Bool),
    ("log-backtrace-at", Sort::Text),
    ("log-dir", Sort::Text),
    ("log-file", Sort::Text),
    ("log-file-max-size", Sort::Number),
    ("logtostderr", Sort::Bool),
    ("one-output", Sort::Bool),
    ("skip-headers", Sort::Bool),
    ("skip-log-headers", Sort::Bool),
    ("stderrthreshold", Sort::Text),
];
const HEADING: &str = "Flags of kube-proxy that are accepted, checked, and have no effect here:";

/// The flags of this sort that were given, as the command line has them: `--proxy-mode`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeProxyFlags {
    pub given: Vec<String>,
}

impl Args for KubeProxyFlags {
    fn augment_args(command: Command) -> Command {
        let names: Vec<String> = FLAGS.iter().map(|(name, _)| format!("--{name}")).collect();
        let command = command.after_long_help(format!("{HEADING}\n  {}", names.join(", ")));
        FLAGS.into_iter().fold(command, |command, (name, sort)| command.arg(argument(name, sort)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn argument(name: &'static str, sort: Sort) -> Arg {
    let argument = Arg::new(name)
        .long(name)
        .value_name(value_name(sort))
        .hide(true)
        .allow_hyphen_values(sort == Sort::Number)
        // As kube-proxy does: given twice, the last one counts, or both are a list.
        .action(ArgAction::Append)
        .value_parser(move |text: &str| sort.check(text).map(|()| text.to_owned()));
    match sort {
        Sort::Bool => argument.num_args(0..=1).require_equals(true).default_missing_value("true"),
        _ => argument,
    }
}

fn value_name(sort: Sort) -> &'static str {
    match sort {
        Sort::Text | Sort::List => "TEXT",
        Sort::Bool => "BOOL",
        Sort::Number => "N",
        Sort::Duration => "DURATION",
        Sort::Cidrs | Sort::CidrList => "CIDRS",
        Sort::Gates => "GATES",
        Sort::OneOf(_) => "MODE",
    }
}

impl FromArgMatches for KubeProxyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = FLAGS.into_iter().filter(|(name, _)| matches.contains_id(name));
        Ok(KubeProxyFlags { given: given.map(|(name, _)| format!("--{name}")).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
