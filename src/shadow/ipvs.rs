//! Virtual servers and their real servers, as `/proc/net/ip_vs` shows them (net/netfilter/ipvs/ip_vs_ctl.c,
//! `ip_vs_info_seq_show`). All numbers of IPv4 are hexadecimal.

use std::io::{self, BufRead};
use std::net::{Ipv4Addr, Ipv6Addr};

use super::listed::protocol;
use super::{Affinity, Answer, Row, Rules, remark};
use crate::abi::FrontendKey;
use crate::model::{Ipx, SocketAddrx};

pub const MODE: &str = "IPVS";
pub const TABLE: &str = "/proc/net/ip_vs";

/// `node`: the node's own addresses. Virtual servers there are for NodePorts; kube-proxy binds all others to kube-ipvs0.
///
/// # Errors
/// When `text` cannot be read to its end.
pub fn parse(text: &mut dyn BufRead, node: &[Ipx]) -> io::Result<Rules> {
    let mut rules = Rules::new(MODE);
    let mut current: Option<(FrontendKey, Vec<SocketAddrx>, Affinity)> = None;
    for line in text.lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["->", at, _forward, weight, ..] if at.contains(':') && *at != "RemoteAddress:Port" => {
                let Some((_, endpoints, _)) = current.as_mut() else { continue };
                match socket(at) {
                    // A real server of weight 0 keeps its connections and gets no new ones.
                    Some(_) if *weight == "0" => {}
                    Some(at) => endpoints.push(at),
                    None => remark(&mut rules.remarks, "a line of /proc/net/ip_vs is not understood", &line),
                }
            }
            [of, at, _scheduler, flags @ ..] if protocol(of).is_some() => {
                add(&mut rules, current.take());
                let (Some(of), Some(at)) = (protocol(of), socket(at)) else {
                    remark(&mut rules.remarks, "a line of /proc/net/ip_vs is not understood", &line);
                    continue;
                };
                let is_node = at.ip.to_ip().is_loopback() || node.contains(&at.ip);
                let ip = if is_node { Ipx::any(at.ip.family()) } else { at.ip };
                let persistent = flags.iter().position(|flag| *flag == "persistent");
                let jiffies = persistent.and_then(|flag| flags.get(flag + 1)?.parse().ok());
                let affinity = jiffies.map_or(Affinity::Seconds(0), Affinity::Jiffies);
                current = Some((FrontendKey::new(ip, at.port, of), Vec::new(), affinity));
            }
            ["FWM", ..] => {
                add(&mut rules, current.take());
            }
            _ => {}
        }
    }
    add(&mut rules, current);
    Ok(rules)
}

/// A virtual server without real servers refuses.
fn add(rules: &mut Rules, server: Option<(FrontendKey, Vec<SocketAddrx>, Affinity)>) {
    let Some((key, mut endpoints, affinity)) = server else { return };
    endpoints.sort_unstable();
    endpoints.dedup();
    let answer = Some(if endpoints.is_empty() { Answer::Refused } else { Answer::Endpoints(endpoints) });
    // NodePorts have a virtual server on each address of the node, all alike.
    let row = Row { label: String::new(), inside: answer.clone(), outside: answer, affinity };
    rules.rows.entry(key).or_insert(row);
}

/// "0A600001:0050" or "[fd96:0000:...]:0050".
fn socket(text: &str) -> Option<SocketAddrx> {
    let (ip, port) = text.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let ip: Ipx = match ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')) {
        Some(ip) => ip.parse::<Ipv6Addr>().ok()?.into(),
        None => Ipv4Addr::from_bits(u32::from_str_radix(ip, 16).ok()?).into(),
    };
    Some(SocketAddrx { ip, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 rr persistent 1080000 FFFFFFFF
  -> 0AF4010A:1F90      Masq    1      0          0
  -> 0AF4020A:1F90      Masq    1      3          0
  -> 0AF4030A:1F90      Masq    0      3          0
UDP  [fd96:0000:0000:0000:0000:0000:0000:0002]:0035 rr
  -> [fd44:0000:0000:0000:0000:0000:0002:0011]:0035      Masq    1      0          0
TCP  0A600003:0050 rr ops
TCP  AC1F000B:7531 rr
  -> 0AF4010A:1F90      Masq    1      0          0
TCP  7F000001:7531 rr
  -> 0AF4010A:1F90      Masq    1      0          0
FWM  00000001 rr
  -> 0AF4010A:1F90      Masq    1      0          0
";

    #[test]
    fn virtual_servers_are_read_as_the_kernel_shows_them() {
        let rules = parse(&mut TEXT.as_bytes(), &["172.31.0.11".parse().unwrap()]).unwrap();
        assert!(rules.remarks.is_empty(), "{:?}", rules.remarks);
        let mut shown: Vec<String> = Vec::new();
        for (key, row) in &rules.rows {
            shown.push(format!("{} {:?} {:?}", super::super::listed::shown(key), row.outside, row.affinity));
        }
        shown.sort();
        assert_eq!(
            shown,
            [
                "10.96.0.1:80/TCP Some(Endpoints([10.244.1.10:8080, 10.244.2.10:8080])) Jiffies(1080000)",
                "10.96.0.3:80/TCP Some(Refused) Seconds(0)",
                "NodePort 30001/TCP (IPv4) Some(Endpoints([10.244.1.10:8080])) Seconds(0)",
                "[fd96::2]:53/UDP Some(Endpoints([[fd44::2:11]:53])) Seconds(0)",
            ]
        );
    }

    #[test]
    fn a_line_that_is_none_of_the_kernels_is_remarked_upon() {
        let rules = parse(&mut "TCP  0A6000ZZ:0050 rr \n".as_bytes(), &[]).unwrap();
        assert!(rules.rows.is_empty() && rules.remarks.len() == 1, "{rules:?}");
    }
}
