//! `--redact`: addresses and names give way to words, the same one everywhere, so that who reads the report can still tell
//! them apart.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::model::Ipx;

/// Names that every cluster has, and words of our own outputs: they tell nothing.
const COMMON: [&str; 12] = [
    "default",
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "kubernetes",
    "kube-dns",
    "kubelane",
    "name",
    "namespace",
    "-",
    "http",
    "https",
];

/// What has been replaced so far.
#[derive(Debug, Default)]
pub struct Redactor {
    names: HashMap<String, String>,
    addresses: HashMap<IpAddr, String>,
    hosts: HashMap<String, String>,
    counts: HashMap<&'static str, usize>,
}

impl Redactor {
    /// From now on `name` is "KIND-N".
    pub fn learn(&mut self, kind: &'static str, name: &str) {
        if name.is_empty() || COMMON.contains(&name) || self.names.contains_key(name) {
            return;
        }
        let word = self.next(kind);
        self.names.insert(name.to_owned(), word);
    }

    /// Names of objects that are told of as "Service namespace/name" or "EndpointSlice namespace/name".
    pub fn learn_from(&mut self, text: &str) {
        for kind in ["Service ", "EndpointSlice "] {
            for rest in text.split(kind).skip(1) {
                let end = rest.find(|c: char| !is_of_name(c) && c != '/').unwrap_or(rest.len());
                if let Some((namespace, name)) = rest[..end].trim_end_matches('.').split_once('/') {
                    self.learn("namespace", namespace);
                    self.learn("name", name);
                }
            }
        }
    }

    fn next(&mut self, kind: &'static str) -> String {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        format!("{kind}-{count}")
    }

    /// The text without them.
    pub fn text(&mut self, text: &str) -> String {
        let text = self.replace_hosts(text);
        let text = replace(&text, is_of_address, |word| self.address(word));
        replace(&text, is_of_name, |word| self.name(word))
    }

    /// Of "https://HOST".
    fn replace_hosts(&mut self, text: &str) -> String {
        let mut parts = text.split("://");
        let mut replaced = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let end = part.find(|c: char| c.is_whitespace() || "/\"',;)<>".contains(c)).unwrap_or(part.len());
            let (authority, rest) = part.split_at(end);
            // User and password have no place in a report, whoever asks for redaction or not.
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let (bare, port) = match host.rsplit_once(':') {
                Some((bare, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (bare, format!(":{port}")),
                _ => (host, String::new()),
            };
            let ip = bare.trim_start_matches('[').trim_end_matches(']');
            let word = match self.hosts.get(bare) {
                _ if bare.is_empty() || ip.parse::<IpAddr>().is_ok() => bare.to_owned(),
                Some(word) => word.clone(),
                None => {
                    let word = self.next("host");
                    self.hosts.entry(bare.to_owned()).or_insert(word).clone()
                }
            };
            replaced = format!("{replaced}://{word}{port}{rest}");
        }
        replaced
    }

    fn address(&mut self, word: &str) -> Option<String> {
        let bare = word.trim_end_matches(['.', ':']);
        let port_of = |text: &str| text.rsplit_once(':').map(|(ip, port)| (ip.to_owned(), port.to_owned()));
        for candidate in [word, bare] {
            if let Ok(ip) = candidate.parse::<IpAddr>() {
                return Some(format!("{}{}", self.address_word(ip)?, &word[candidate.len()..]));
            }
        }
        let (ip, port) = port_of(bare)?;
        let ip = ip.parse::<std::net::Ipv4Addr>().ok()?;
        Some(format!("{}:{port}{}", self.address_word(ip.into())?, &word[bare.len()..]))
    }

    /// Those that every machine has stay.
    fn address_word(&mut self, ip: IpAddr) -> Option<String> {
        let ip = Ipx::from(ip).to_ip();
        if ip.is_loopback() || ip.is_unspecified() {
            return None;
        }
        if let Some(word) = self.addresses.get(&ip) {
            return Some(word.clone());
        }
        let word = self.next(if ip.is_ipv4() { "ipv4" } else { "ipv6" });
        self.addresses.insert(ip, word.clone());
        Some(word)
    }

    /// A name, or one that begins with it: a slice's is its Service's with something behind.
    fn name(&self, word: &str) -> Option<String> {
        let mut known = word;
        loop {
            if let Some(replaced) = self.names.get(known) {
                let rest = &word[known.len()..];
                return Some(if rest.starts_with('-') { format!("{replaced}-x") } else { format!("{replaced}{rest}") });
            }
            known = &known[..known.rfind(['-', '.'])?];
        }
    }
}

fn is_of_address(c: char) -> bool {
    c.is_ascii_hexdigit() || c == '.' || c == ':'
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_'
}

/// Words of such characters, each given to `by`.
fn replace(text: &str, is_of_word: impl Fn(char) -> bool, mut by: impl FnMut(&str) -> Option<String>) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let begin = rest.find(&is_of_word).unwrap_or(rest.len());
        replaced.push_str(&rest[..begin]);
        rest = &rest[begin..];
        let end = rest.find(|c| !is_of_word(c)).unwrap_or(rest.len());
        match by(&rest[..end]) {
            Some(word) => replaced.push_str(&word),
            None => replaced.push_str(&rest[..end]),
        }
        rest = &rest[end..];
    }
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_become_the_same_word_everywhere() {
        let mut redactor = Redactor::default();
        for (kind, name) in
            [("namespace", "shop"), ("name", "web"), ("node", "node-a.example.com"), ("namespace", "default")]
        {
            redactor.learn(kind, name);
        }
        redactor.learn_from("Service old/cart: port 80; EndpointSlice shop/api-x1z: no address");
        for (given, expected) in [
            ("shop/web:http at 10.96.0.80:80, from 10.244.1.2.", "namespace-1/name-1:http at ipv4-1:80, from ipv4-2."),
            ("again 10.96.0.80 and ::ffff:10.96.0.80", "again ipv4-1 and ipv4-1"),
            ("[fd96::80]:80/TCP in fd96::/64", "[ipv6-1]:80/TCP in ipv6-2/64"),
            ("127.0.0.1:10249 [::]:80 0.0.0.0:30080", "127.0.0.1:10249 [::]:80 0.0.0.0:30080"),
            ("EndpointSlice shop/web-abc12 on node-a.example.com", "EndpointSlice namespace-1/name-1-x on node-1"),
            (
                "Service old/cart, websites, default/kubernetes",
                "Service namespace-2/name-2, websites, default/kubernetes",
            ),
            ("2026-11-29T03:12:15.123456Z INFO sync took=1.5ms", "2026-11-29T03:12:15.123456Z INFO sync took=1.5ms"),
            ("--master https://me:secret@api.example.com:6443/x", "--master https://host-1:6443/x"),
            ("https://10.0.0.1:6443", "https://ipv4-3:6443"),
        ] {
            assert_eq!(redactor.text(given), expected);
        }
    }
}
