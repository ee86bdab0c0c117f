//! Flags, environment, configuration file, defaults: in this order the first that says something wins.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::UsageError;
use super::address::{default_healthz, default_metrics};
use super::config_file::ConfigFile;
use super::flags::{NodeFlags, RunFlags, Source, SourceFlags};
use crate::netdev::NodePortAddresses;

/// What is to be said of the settings at the start.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Remarks {
    /// Settings that were given and have no meaning here.
    pub ignored: Vec<String>,
    /// What is not as it should be and is read as kube-proxy reads it.
    pub odd: Vec<String>,
}

impl NodeFlags {
    /// What `--config` names; nothing when it is not given.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that is not known.
    pub fn config_file(&self) -> Result<ConfigFile, UsageError> {
        let path = self.config.as_deref().map(Path::new);
        path.map_or_else(|| Ok(ConfigFile::default()), ConfigFile::read).map_err(UsageError)
    }

    /// Fills in from the file what was not given.
    pub fn complete(&mut self, file: &ConfigFile) {
        self.bind_address = self.bind_address.or(file.bind_address);
        self.bind_address_hard_fail = self.bind_address_hard_fail.or(file.bind_address_hard_fail);
        let ported = |port: Option<u16>, of_file| if port.is_some() { None } else { of_file };
        self.healthz_bind_address = self.healthz_bind_address.or(ported(self.healthz_port, file.healthz));
        self.metrics_bind_address = self.metrics_bind_address.or(ported(self.metrics_port, file.metrics));
    }

    /// Where health is served; `None`: nowhere.
    pub fn healthz(&self) -> Option<SocketAddr> {
        self.healthz_bind_address.unwrap_or_else(|| default_healthz(self.bind_address, self.healthz_port)).0
    }

    /// Where metrics are served; `None`: nowhere.
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics_bind_address.unwrap_or_else(|| default_metrics(self.bind_address, self.metrics_port)).0
    }
}

impl SourceFlags {
    /// Fills in the kubeconfig that the file names. True when it has no meaning: the source is a directory.
    pub fn complete(&mut self, kubeconfig: Option<PathBuf>) -> bool {
        if matches!(self.source, Some(Source::Directory(_))) {
            return kubeconfig.is_some();
        }
        self.kubeconfig = self.kubeconfig.take().or(kubeconfig);
        false
    }
}

impl RunFlags {
    /// Fills in from `--config` what was not given. Returns what is to be said of the settings.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that is not known.
    pub fn complete(&mut self) -> Result<Remarks, UsageError> {
        let file = self.node.config_file()?;
        self.node.complete(&file);
        self.traffic.complete(&file);
        let mut ignored = self.kube_proxy.given.clone();
        ignored.extend(file.ignored);
        if self.source.complete(file.kubeconfig) {
            ignored.push("clientConnection.kubeconfig".to_owned());
        }
        let given = self.source.hostname_override.take().filter(|name| !name.trim().is_empty());
        self.source.hostname_override = given.or(file.hostname_override);
        let given = std::mem::take(&mut self.nodeport_addresses).into_iter().map(Ok);
        let given = given.reduce(|all, next| all?.and(next?)).transpose();
        let given = given.map_err(|problem| UsageError(format!("--nodeport-addresses: {problem}")))?;
        self.nodeport_addresses.extend(given.or(file.nodeport_addresses));
        self.oom_score_adj = self.oom_score_adj.or(file.oom_score_adj);
        self.log.verbosity = self.log.verbosity.or(file.verbosity);
        self.log.log_format = self.log.log_format.or(file.log_format);
        let twice = self.repeated.iter().map(|flag| format!("{flag} (given twice: the last one counts)"));
        Ok(Remarks { ignored, odd: twice.chain(file.odd).collect() })
    }

    /// Which addresses serve NodePorts; `--bind-address`, if it is one, is the node's primary address of its family.
    pub fn nodeport_addresses(&self) -> NodePortAddresses {
        let addresses = self.nodeport_addresses.first().cloned().unwrap_or_default();
        match self.node.bind_address {
            Some(ip) if !ip.is_unspecified() => addresses.with_primary(ip.into()),
            _ => addresses,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::flags::{Cli, Command, LogFormat};
    use super::super::parse;
    use super::*;

    const FILE: &str = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: '::'
clientConnection: {kubeconfig: /file/kubeconfig}
healthzBindAddress: '[::1]:1111'
hostnameOverride: of-the-file
logging: {format: json, verbosity: 4}
nodePortAddresses: [primary]
oomScoreAdj: -5
mode: ipvs
";

    fn run(flags: &[&str]) -> (RunFlags, Remarks) {
        let line = [&["kubelane", "run"], flags].concat();
        let Ok(Cli { command: Command::Run(mut flags) }) = parse(line.iter().map(Into::into).collect()) else {
            panic!("another command")
        };
        let remarks = flags.complete().unwrap();
        (*flags, remarks)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(FILE.as_bytes()).unwrap();
        let config = format!("--config={}", file.path().display());
        let at = |text: &str| Some(text.parse::<SocketAddr>().unwrap());

        let (flags, remarks) = run(&[]);
        assert_eq!((flags.node.healthz(), flags.node.metrics()), (at("0.0.0.0:10256"), at("127.0.0.1:10249")));
        assert!(remarks == Remarks::default() && flags.log.verbosity.is_none() && flags.source.kubeconfig.is_none());

        let (flags, Remarks { ignored, .. }) = run(&[&config]);
        assert_eq!((flags.node.healthz(), flags.node.metrics()), (at("[::1]:1111"), at("[::1]:10249")));
        assert_eq!(flags.source.kubeconfig.as_deref(), Some(Path::new("/file/kubeconfig")));
        assert_eq!(flags.source.hostname_override.as_deref(), Some("of-the-file"));
        assert_eq!(flags.nodeport_addresses(), NodePortAddresses::Primary);
        assert_eq!((flags.log.verbosity, flags.log.log_format), (Some(4), Some(LogFormat::Json)));
        assert_eq!((flags.oom_score_adj, ignored), (Some(-5), vec!["mode".to_owned()]));

        let given = "--kubeconfig=/k --hostname-override=b --healthz-port=2222 --metrics-bind-address=127.0.0.1:3333 \
                     --nodeport-addresses=10.0.0.0/8 -v=0 --logging-format=text --oom-score-adj=7 --proxy-mode=nftables";
        let (flags, Remarks { ignored, .. }) =
            run(&[&[config.as_str()], &given.split_whitespace().collect::<Vec<_>>()[..]].concat());
        assert_eq!((flags.node.healthz(), flags.node.metrics()), (at("[::]:2222"), at("127.0.0.1:3333")));
        assert_eq!(flags.source.kubeconfig.as_deref(), Some(Path::new("/k")));
        assert_eq!(flags.source.hostname_override.as_deref(), Some("b"));
        assert_eq!(flags.nodeport_addresses(), "10.0.0.0/8".parse().unwrap());
        assert_eq!((flags.log.verbosity, flags.log.log_format), (Some(0), Some(LogFormat::Human)));
        assert_eq!(
            (flags.oom_score_adj, ignored.as_slice()),
            (Some(7), &["--proxy-mode".to_owned(), "mode".to_owned()][..])
        );

        let (flags, Remarks { ignored, .. }) = run(&[&config, "--source=dir:/x", "--healthz-bind-address="]);
        assert_eq!((flags.node.healthz(), flags.source.kubeconfig), (None, None));
        assert_eq!(ignored, ["mode", "clientConnection.kubeconfig"]);
    }

    #[test]
    fn what_is_odd_in_flags_and_file_is_named_together() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(format!("{FILE}metadata: {{}}\n").as_bytes()).unwrap();
        let config = format!("--config={}", file.path().display());
        let (flags, remarks) =
            run(&[&config, "-v=1", "-v=0", "--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses=fd00::/8"]);
        assert_eq!(flags.nodeport_addresses(), "10.0.0.0/8,fd00::/8".parse().unwrap());
        assert_eq!(flags.log.verbosity, Some(0));
        assert_eq!(remarks.odd, ["--v (given twice: the last one counts)", "metadata (unknown field)"]);

        let line = ["kubelane", "--nodeport-addresses=primary", "--nodeport-addresses=10.0.0.0/8"];
        let Ok(Cli { command: Command::Run(mut flags) }) = parse(line.iter().map(Into::into).collect()) else {
            panic!("another command")
        };
        let error = flags.complete().unwrap_err().to_string();
        assert!(error.starts_with("--nodeport-addresses: `primary` cannot stand in a list; allowed are"), "{error}");
    }
}
