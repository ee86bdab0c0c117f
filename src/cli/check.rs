//! `kubelane check`: would the daemon run here? One line per condition, with a remedy where something is missing.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use super::config_file::ConfigFile;
use super::finding::{Finding, Level};
use super::flags::CheckFlags;
use super::host::find_cgroup;
use super::leftovers::{LOOPBACK_IS_ROUTED, LOOPBACK_REMEDY, kube_proxy_chains, listener_on, routes_loopback};
use super::outward::{Outward, outward};
use super::pods::pods;
use super::source_check as source;
use crate::bpf::pinned::{BPFFS, abi_directory, is_on_bpffs};
use crate::bpf::{Privileges, probe};
use crate::netdev::{DeviceSelection, IPVS_DEVICE};
use crate::serve::{HEALTHZ_FLAG, METRICS_FLAG, listen};

/// kubelane serves the sockets of the node; what comes from outside is kube-proxy's for as long as it runs.
const KUBE_PROXY_REMEDY: &str = "fine while kube-proxy runs; once it is gone for good, run `kube-proxy --cleanup`";

/// Prints the findings; true when the daemon would run.
///
/// # Errors
/// When `--config` cannot be used, or standard output cannot be written to.
pub fn run(flags: CheckFlags) -> anyhow::Result<bool> {
    let (text, would_run) = text(flags)?;
    super::print(&text)?;
    Ok(would_run)
}

/// The findings, and whether the daemon would run.
///
/// # Errors
/// When `--config` cannot be used.
pub fn text(mut flags: CheckFlags) -> anyhow::Result<(String, bool)> {
    let file = flags.node.config_file()?;
    flags.node.complete(&file);
    let pin_path = &flags.node.pins.pin_path;
    let own = Privileges::own();
    let mut findings = vec![privileges(own)];
    findings.extend(features(own));
    findings.push(forwarding());
    findings.extend(devices(&flags.devices, pin_path));
    findings.extend(pod_devices(&flags.devices));
    findings.push(cgroup(flags.node.cgroup.as_deref()));
    findings.push(bpffs(pin_path));
    let hard = flags.node.bind_address_hard_fail.unwrap_or_default();
    findings.push(port("health port", HEALTHZ_FLAG, flags.node.healthz(), hard));
    findings.push(port("metrics port", METRICS_FLAG, flags.node.metrics(), hard));
    findings.push(chains());
    findings.push(ipvs_device());
    findings.push(loopback());
    findings.push(own_pins(pin_path));
    flags.source.complete(file.kubeconfig.clone());
    findings.extend(configuration(&file));
    findings.extend(source::findings(&flags.source));
    let mut text: String = findings.iter().map(|finding| format!("{finding}\n")).collect();
    let failed = findings.iter().filter(|f| f.level == Level::Fail).count();
    text += &match failed {
        0 => "kubelane would run here.\n".to_owned(),
        1 => "kubelane would not run here: 1 condition fails.\n".to_owned(),
        n => format!("kubelane would not run here: {n} conditions fail.\n"),
    };
    Ok((text, failed == 0))
}

/// Says nothing of a file that is as it should be, and of none.
fn configuration(file: &ConfigFile) -> Option<Finding> {
    const REMEDY: &str = "correct the file; the daemon reads it as kube-proxy does";
    (!file.odd.is_empty()).then(|| Finding::warn("configuration file", file.odd.join(", "), REMEDY))
}

fn privileges(own: Privileges) -> Finding {
    const WHAT: &str = "privileges";
    const REMEDY: &str = "run as root, or add the capabilities";
    let missing = own.missing();
    if !missing.is_empty() {
        return Finding::fail(WHAT, format!("missing {}", missing.join(", ")), REMEDY);
    }
    if !own.has_sys_admin() {
        let detail = "no CAP_SYS_ADMIN: sockets of pods whose backend is gone cannot be destroyed";
        return Finding::warn(WHAT, detail, REMEDY);
    }
    Finding::ok(WHAT, "CAP_SYS_ADMIN and CAP_NET_ADMIN")
}

/// Without privileges the kernel answers "no" to every question, which says nothing of the kernel.
fn features(own: Privileges) -> Vec<Finding> {
    if own.missing().is_empty() {
        return kernel_features();
    }
    vec![Finding::warn("kernel features", "not checked: privileges are missing", "run the check as root")]
}

fn kernel_features() -> Vec<Finding> {
    let finding = |feature: probe::Feature| {
        let needed = format!("needed for {}", feature.needed_for);
        match (feature.found, feature.required) {
            (true, _) => Finding::ok(feature.name, feature.needed_for),
            (false, true) => Finding::fail(feature.name, format!("not found; {needed}"), feature.without),
            (false, false) => Finding::warn(feature.name, format!("not found; {needed}"), feature.without),
        }
    };
    probe::features().into_iter().map(finding).collect()
}

/// Every CNI turns it on; without it packets for pods on other nodes are dropped.
fn forwarding() -> Finding {
    const WHAT: &str = "forwarding between devices";
    const SYSCTLS: [(&str, &str); 2] =
        [("IPv4", "net.ipv4.conf.all.forwarding"), ("IPv6", "net.ipv6.conf.all.forwarding")];
    let is_off = |sysctl: &str| {
        let value = std::fs::read_to_string(format!("/proc/sys/{}", sysctl.replace('.', "/")));
        value.is_ok_and(|value| value.trim() == "0")
    };
    let off: Vec<_> = SYSCTLS.into_iter().filter(|(_, sysctl)| is_off(sysctl)).collect();
    if off.is_empty() {
        return Finding::ok(WHAT, "on");
    }
    let families: Vec<&str> = off.iter().map(|(family, _)| *family).collect();
    let commands: Vec<String> = off.iter().map(|(_, sysctl)| format!("sysctl -w {sysctl}=1")).collect();
    let detail = format!("off for {}: traffic from outside reaches no pod on another node", families.join(" and "));
    Finding::warn(WHAT, detail, commands.join("; "))
}

fn devices(selection: &DeviceSelection, pin_path: &Path) -> Vec<Finding> {
    const WHAT: &str = "devices for traffic from outside";
    match outward(selection, pin_path) {
        Ok(Outward { devices, troubles }) if troubles.is_empty() => vec![Finding::ok(WHAT, devices)],
        Ok(found) => found.troubles.into_iter().map(|(what, remedy)| Finding::warn(WHAT, what, remedy)).collect(),
        Err(error) => vec![Finding::warn(WHAT, format!("not checked: {error:#}"), "run the check as root")],
    }
}

/// Pods without such a device are served, but not all of what they send.
fn pod_devices(selection: &DeviceSelection) -> Vec<Finding> {
    const WHAT: &str = "devices of pods";
    const REMEDY: &str =
        "their sockets are served; packets of virtual machines, SCTP and loadBalancerSourceRanges are not";
    match pods(selection) {
        Ok(pods) if pods.without.is_empty() => vec![Finding::ok(WHAT, pods.devices.to_string())],
        Ok(pods) => {
            let without = |(kind, count): (&String, &usize)| format!("{count} of kind {kind}");
            let kinds = pods.without.iter().map(without).collect::<Vec<_>>().join(", ");
            let detail = format!("{}; pods without an end on the node: {kinds}", pods.devices);
            vec![Finding::warn(WHAT, detail, REMEDY)]
        }
        Err(error) => vec![Finding::warn(WHAT, format!("not checked: {error:#}"), "run the check as root")],
    }
}

fn cgroup(wanted: Option<&Path>) -> Finding {
    const WHAT: &str = "cgroup2";
    match find_cgroup(wanted) {
        Ok(cgroup) if cgroup.is_root => Finding::ok(WHAT, format!("{} (every process)", cgroup.path.display())),
        Ok(cgroup) if wanted.is_some() => {
            Finding::ok(WHAT, format!("{} (processes in it and below)", cgroup.path.display()))
        }
        Ok(cgroup) => Finding::warn(
            WHAT,
            format!("{} is not the root of the hierarchy: processes outside it are not served", cgroup.path.display()),
            "in a container: mount the host's /sys/fs/cgroup and name it with --cgroup",
        ),
        Err(error) => Finding::fail(WHAT, format!("{error:#}"), ""),
    }
}

fn bpffs(pin_path: &Path) -> Finding {
    const WHAT: &str = "BPF filesystem";
    let path = pin_path.display();
    if is_on_bpffs(pin_path) {
        return Finding::ok(WHAT, format!("at {path}"));
    }
    if pin_path.starts_with(BPFFS) {
        return Finding::warn(WHAT, format!("none at {BPFFS} yet"), "`kubelane run` mounts it");
    }
    Finding::fail(
        WHAT,
        format!("--pin-path {path} is not on one"),
        format!("mkdir -p {path} && mount -t bpf bpf {path}"),
    )
}

/// Whether a server could listen there. `hard`: the daemon ends if not.
fn port(what: &'static str, flag: &str, address: Option<SocketAddr>, hard: bool) -> Finding {
    let Some(address) = address else { return Finding::ok(what, format!("off ({flag})")) };
    let Err(error) = listen(address) else { return Finding::ok(what, format!("{address} is free")) };
    let (without, later) = match hard {
        true => ("the daemon exits (--bind-address-hard-fail)", ""),
        false => ("Services are served without it", ", and the daemon binds it when it is free"),
    };
    let (detail, remedy) = match listener_on(address.port()) {
        Some(process) if process.starts_with("kubelane ") => (
            format!("{address} is held by {process}: a daemon is running already"),
            "stop it before you start another".to_owned(),
        ),
        Some(process) => {
            (format!("{address} is held by {process}: {without}{later}"), format!("choose another {flag}, or stop it"))
        }
        None => (format!("cannot listen on {address}: {error}: {without}"), format!("choose another {flag}")),
    };
    if hard { Finding::fail(what, detail, remedy) } else { Finding::warn(what, detail, remedy) }
}

fn chains() -> Finding {
    const WHAT: &str = "kube-proxy's packet filter rules";
    const SHOWN: usize = 3;
    match kube_proxy_chains() {
        None => Finding::warn(
            WHAT,
            "not checked: neither nft nor iptables-save works here",
            "run `nft list chains` as root on the node and look for KUBE-",
        ),
        Some(found) if found.is_empty() => Finding::ok(WHAT, "none"),
        Some(found) => {
            let some: Vec<&str> = found.iter().take(SHOWN).map(String::as_str).collect();
            let more = if found.len() > SHOWN { ", ..." } else { "" };
            let detail = format!("{} found ({}{more})", found.len(), some.join(", "));
            Finding::warn(WHAT, detail, KUBE_PROXY_REMEDY)
        }
    }
}

fn ipvs_device() -> Finding {
    const WHAT: &str = "kube-proxy's IPVS device";
    match nix::net::if_::if_nametoindex(IPVS_DEVICE) {
        Ok(_) => Finding::warn(
            WHAT,
            format!("{IPVS_DEVICE} found; its addresses are ignored"),
            format!("{KUBE_PROXY_REMEDY} or `ip link del {IPVS_DEVICE}`"),
        ),
        Err(_) => Finding::ok(WHAT, "none"),
    }
}

fn loopback() -> Finding {
    const WHAT: &str = "packets for 127.0.0.0/8 from outside";
    match routes_loopback() {
        true => Finding::warn(WHAT, LOOPBACK_IS_ROUTED, LOOPBACK_REMEDY),
        false => Finding::ok(WHAT, "refused"),
    }
}

fn own_pins(pin_path: &Path) -> Finding {
    const WHAT: &str = "kubelane's own state";
    let path = pin_path.display();
    match abi_directory(pin_path).try_exists() {
        Ok(false) => {}
        Ok(true) => {
            let detail = format!("found in {path}; `kubelane run` takes it over, `kubelane cleanup` removes it");
            return Finding::ok(WHAT, detail);
        }
        Err(error) => {
            return Finding::warn(WHAT, format!("cannot look into {path}: {error}"), "run the check as root");
        }
    }
    let others = fs::read_dir(pin_path).is_ok_and(|mut entries| entries.next().is_some());
    if others {
        return Finding::warn(WHAT, format!("{path} has the state of another version"), "`kubelane run` replaces it");
    }
    Finding::ok(WHAT, format!("none in {path}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn missing_privileges_fail_and_leave_the_kernel_unjudged() {
        let table = [
            ("CapEff:\t000001ffffffffff", Level::Ok, "CAP_SYS_ADMIN and"),
            ("CapEff:\t000000c000001000", Level::Warn, "no CAP_SYS_ADMIN"),
            ("CapEff:\t0000000000001000", Level::Fail, "missing CAP_BPF, CAP_PERFMON"),
        ];
        for (status, level, detail) in table {
            let finding = privileges(Privileges::in_status(status));
            assert_eq!(finding.level, level, "{status}");
            assert!(finding.detail.starts_with(detail), "{finding}");
            assert_eq!(finding.remedy.is_empty(), level == Level::Ok, "{finding}");
        }
        let unjudged = features(Privileges::in_status(""));
        assert_eq!(unjudged.len(), 1);
        assert!(unjudged[0].level == Level::Warn && unjudged[0].detail.starts_with("not checked"), "{}", unjudged[0]);
    }

    #[test]
    fn a_port_that_is_taken_is_told_with_the_process_and_the_flag() {
        let _forks = crate::FORKS.blocking_lock();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let taken = port("health port", HEALTHZ_FLAG, Some(address), false);
        let pid = format!("(pid {})", std::process::id());
        // The test runner's own name begins with "kubelane", too, but not with the daemon's.
        assert!(taken.level == Level::Warn && taken.detail.contains(&pid), "{taken}");
        let hard = port("health port", HEALTHZ_FLAG, Some(address), true);
        assert!(hard.level == Level::Fail && hard.detail.contains("the daemon exits"), "{hard}");
        drop(listener);
        assert_eq!(port("health port", HEALTHZ_FLAG, Some(address), true).level, Level::Ok);
        assert_eq!(port("health port", HEALTHZ_FLAG, None, true).level, Level::Ok);
    }

    #[test]
    fn a_line_has_its_level_its_subject_and_its_remedy() {
        let finding = Finding::fail("cgroup2", "not mounted", "mount it");
        assert_eq!(finding.to_string(), format!("FAIL  {:<36} not mounted -> mount it", "cgroup2"));
    }

    #[test]
    fn a_directory_of_another_kind_is_no_bpf_filesystem() {
        let directory = tempfile::tempdir().unwrap();
        let finding = bpffs(directory.path());
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.remedy.contains("mount -t bpf"), "{finding}");
        assert_eq!(own_pins(directory.path()).level, Level::Ok);
    }
}
