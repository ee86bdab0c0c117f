//! What values of kube-proxy's settings look like, in flags and in the configuration file alike. Settings that have no
//! meaning here are checked all the same: a typing error in one of them is as likely to be one in the next.

use std::time::Duration;

use ipnet::IpNet;

use crate::model::FlowTimeouts;

/// The sort of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Text,
    /// true or false.
    Bool,
    /// A number, fractions included.
    Number,
    /// As Go writes them: 1m30s, 250ms, 0.
    Duration,
    /// CIDRs separated by commas.
    Cidrs,
    /// A list of CIDRs.
    CidrList,
    /// A list of anything.
    List,
    /// NAME=true or NAME=false, separated by commas; in a file, an object.
    Gates,
    /// One of these, or nothing.
    OneOf(&'static [&'static str]),
}

/// `mode` and `--proxy-mode` on Linux.
pub const MODES: Sort = Sort::OneOf(&["iptables", "ipvs", "nftables"]);
/// `detectLocalMode` and `--detect-local-mode`.
pub const LOCAL_MODES: Sort = Sort::OneOf(&["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]);

impl Sort {
    /// Checks a value as a flag has it.
    ///
    /// # Errors
    /// What is allowed, when `text` is not.
    pub fn check(self, text: &str) -> Result<(), String> {
        let cidrs = || text.split(',').all(|part| part.trim().parse::<IpNet>().is_ok());
        let gate = |part: &str| part.split_once('=').is_some_and(|(name, on)| !name.is_empty() && is_bool(on));
        let fits = match self {
            Sort::Text | Sort::List => true,
            Sort::Bool => is_bool(text),
            Sort::Number => text.parse::<f64>().is_ok_and(f64::is_finite),
            Sort::Duration => is_duration(text),
            Sort::Cidrs | Sort::CidrList => text.is_empty() || cidrs(),
            Sort::Gates => text.is_empty() || text.split(',').all(gate),
            Sort::OneOf(allowed) => text.is_empty() || allowed.contains(&text),
        };
        if fits { Ok(()) } else { Err(format!("{text:?} is not valid: {}", self.allowed())) }
    }

    /// Says what is allowed.
    pub fn allowed(self) -> String {
        match self {
            Sort::Text => "expected a text".to_owned(),
            Sort::Bool => "expected true or false".to_owned(),
            Sort::Number => "expected a number".to_owned(),
            Sort::Duration => "expected a duration such as 30s, 1m30s or 2h22m".to_owned(),
            Sort::Cidrs => "expected CIDRs separated by commas".to_owned(),
            Sort::CidrList => "expected a list of CIDRs".to_owned(),
            Sort::List => "expected a list".to_owned(),
            Sort::Gates => "expected NAME=true or NAME=false".to_owned(),
            Sort::OneOf(allowed) => format!("expected one of {}", allowed.join(", ")),
        }
    }
}

/// What Go's flag package takes for a boolean.
fn is_bool(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True" | "0" | "f" | "F" | "false" | "FALSE" | "False")
}

pub fn is_duration(text: &str) -> bool {
    text == "0" || text.parse::<jiff::SignedDuration>().is_ok()
}

/// A boolean flag's value, as Go reads it.
///
/// # Errors
/// What is allowed, when `text` is not.
pub fn boolean(text: &str) -> Result<bool, String> {
    Sort::Bool.check(text).map(|()| text.starts_with(['1', 't', 'T']))
}

/// One of [`FlowTimeouts`]; zero stands for its default.
///
/// # Errors
/// What is allowed, when `text` is not.
pub fn timeout(text: &str) -> Result<Duration, String> {
    Sort::Duration.check(text)?;
    if is_zero_duration(text) {
        return Ok(Duration::ZERO);
    }
    let signed = text.parse::<jiff::SignedDuration>().ok();
    let timeout = signed.and_then(|signed| Duration::try_from(signed).ok());
    let fits = |timeout: &Duration| (FlowTimeouts::LEAST..=FlowTimeouts::MOST).contains(timeout);
    timeout.filter(fits).ok_or_else(|| format!("{text:?} is not valid: expected 1s to 720h, or 0 for the default"))
}

/// Whether a duration is nothing: 0, 0s.
pub fn is_zero_duration(text: &str) -> bool {
    text == "0" || text.parse::<jiff::SignedDuration>().is_ok_and(|duration| duration.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_sort_are_known_from_others() {
        let table: [(Sort, &[&str], &[&str]); 7] = [
            (Sort::Bool, &["true", "F", "0"], &["", "yes", "2"]),
            (Sort::Number, &["14", "-999", "0.5"], &["", "many", "NaN", "1s"]),
            (Sort::Duration, &["0", "0s", "15m0s", "250ms", "2h22m", "1.5h"], &["", "5", "soon", "5 parsecs"]),
            (Sort::Cidrs, &["", "10.0.0.0/8", "10.0.0.0/8,fd00::/8"], &["10.0.0.1", "10.0.0.0/8,"]),
            (Sort::Gates, &["", "A=true,B=false"], &["A", "A=maybe", "=true"]),
            (MODES, &["", "iptables", "ipvs", "nftables"], &["kernelspace", "IPVS"]),
            (LOCAL_MODES, &["", "ClusterCIDR"], &["cluster"]),
        ];
        for (sort, good, bad) in table {
            for text in good {
                assert_eq!(sort.check(text), Ok(()), "{sort:?}");
            }
            for text in bad {
                let error = sort.check(text).unwrap_err();
                assert!(error.contains(&format!("{text:?}")), "{error}");
            }
        }
        assert!(MODES.check("x").unwrap_err().ends_with("expected one of iptables, ipvs, nftables"));
        assert!(is_zero_duration("0s") && is_zero_duration("0") && !is_zero_duration("1ms"));
        assert!(["1", "t", "TRUE"].iter().all(|on| boolean(on) == Ok(true)) && boolean("F") == Ok(false));
        assert!(boolean("yes").unwrap_err().contains("true or false"));
    }

    #[test]
    fn a_timeout_of_a_flow_is_a_second_to_thirty_days_or_zero() {
        let table = [("0", 0), ("0s", 0), ("1s", 1), ("1000000000ns", 1), ("1m30s", 90), ("720h", 2_592_000)];
        for (text, seconds) in table {
            assert_eq!(timeout(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["999ms", "-1s", "720h0m1s", "-720h", "99999999h"] {
            assert!(timeout(bad).unwrap_err().ends_with("expected 1s to 720h, or 0 for the default"), "{bad}");
        }
        assert!(timeout("soon").unwrap_err().contains("a duration such as 30s"));
    }
}
