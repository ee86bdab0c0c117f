//! The capabilities that this process has, and those that the datapath needs (capabilities(7)).

use std::fs;

// linux/capability.h.
const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// The effective capabilities of a process.
#[derive(Clone, Copy, Debug)]
pub struct Privileges(u64);

impl Privileges {
    /// This process's.
    pub fn own() -> Self {
        Privileges::in_status(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// Those that a process's /proc/PID/status names; none when it names none.
    pub fn in_status(status: &str) -> Self {
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        Privileges(effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0))
    }

    /// What the datapath cannot do without and is not there. CAP_SYS_ADMIN stands for the newer two.
    pub fn missing(self) -> Vec<&'static str> {
        let all = [
            ("CAP_NET_ADMIN", self.has(NET_ADMIN)),
            ("CAP_BPF", self.has(BPF) || self.has(SYS_ADMIN)),
            ("CAP_PERFMON", self.has(PERFMON) || self.has(SYS_ADMIN)),
        ];
        all.into_iter().filter(|(_, present)| !present).map(|(name, _)| name).collect()
    }

    /// CAP_SYS_ADMIN: pods' network namespaces can be entered, and a BPF file system mounted.
    pub fn has_sys_admin(self) -> bool {
        self.has(SYS_ADMIN)
    }

    fn has(self, capability: u32) -> bool {
        self.0 & (1 << capability) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let table: [(&str, &[&str]); 6] = [
            ("CapEff:\t000001ffffffffff", &[]),
            ("CapEff:\t0000000000201000", &[]),
            ("CapEff:\t000000c000001000", &[]),
            ("CapEff:\t0000000000001000", &["CAP_BPF", "CAP_PERFMON"]),
            ("CapInh:\t000001ffffffffff\nCapEff:\t0000000000000000", &["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]),
            ("", &["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]),
        ];
        for (status, missing) in table {
            assert_eq!(Privileges::in_status(status).missing(), missing, "{status}");
        }
    }
}
