//! kube-proxy's rules in the output of `nft -j list table ip kube-proxy`. The objects of the list are read one by one; which
//! maps are for what follows from the rules that look packets up in them, beginning at the kernel's hooks.

use std::fmt;
use std::io::{self, BufRead};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::chains::{Chains, Rule, Then, When};
use super::listed::{Destinations, protocol};
use super::{Rules, remark};
use crate::abi::FrontendKey;
use crate::model::{Family, Ipx, SocketAddrx};
use crate::table::HashMap;

pub const MODE: &str = "nftables";

/// One object of the list; all others are left out.
#[derive(Deserialize)]
struct Object {
    chain: Option<ChainObject>,
    rule: Option<RuleObject>,
    map: Option<MapObject>,
    set: Option<SetObject>,
}

#[derive(Deserialize)]
struct ChainObject {
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    hook: Option<String>,
}

#[derive(Deserialize)]
struct RuleObject {
    chain: String,
    #[serde(default)]
    expr: Vec<Value>,
}

#[derive(Deserialize)]
struct MapObject {
    name: String,
    #[serde(default)]
    elem: Vec<Value>,
}

/// Without its elements, which may be as many as there are clients.
#[derive(Deserialize)]
struct SetObject {
    name: String,
    timeout: Option<u32>,
}

/// A rule that looks a packet up in a map.
struct LookUp {
    chain: u32,
    map: String,
    has_address: bool,
}

struct Reader {
    family: Family,
    chains: Chains,
    /// Base chains, and whether they translate.
    hooks: Vec<(u32, bool)>,
    look_ups: Vec<LookUp>,
    /// Verdicts by what is looked up: the address (of maps with one), port, verdict.
    maps: HashMap<String, Vec<(FrontendKey, Then, String)>>,
    /// Seconds, of sets that forget.
    timeouts: HashMap<String, u32>,
    rules: Rules,
}

/// The rules of one family.
///
/// # Errors
/// When `text` cannot be read, or is not JSON of nft.
pub fn parse(text: &mut dyn BufRead, family: Family) -> io::Result<Rules> {
    let mut reader = Reader {
        family,
        chains: Chains::default(),
        hooks: Vec::new(),
        look_ups: Vec::new(),
        maps: HashMap::default(),
        timeouts: HashMap::default(),
        rules: Rules::new(MODE),
    };
    let mut json = serde_json::Deserializer::from_reader(io::BufReader::with_capacity(1 << 16, text));
    json.deserialize_map(TopLevel(&mut reader)).map_err(io::Error::other)?;
    Ok(reader.finish())
}

struct TopLevel<'r>(&'r mut Reader);

impl<'de> Visitor<'de> for TopLevel<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the output of nft -j")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "nftables" {
                map.next_value_seed(List(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct List<'r>(&'r mut Reader);

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(object) = list.next_element::<Object>()? {
            self.0.take(object);
        }
        Ok(())
    }
}

impl Reader {
    fn take(&mut self, object: Object) {
        if let Some(chain) = object.chain {
            let id = self.chains.id(&chain.name);
            if chain.hook.is_some() {
                self.hooks.push((id, chain.kind.as_deref() == Some("nat")));
            }
        } else if let Some(set) = object.set {
            if let Some(seconds) = set.timeout {
                self.timeouts.insert(set.name, seconds);
            }
        } else if let Some(map) = object.map {
            self.map(map);
        } else if let Some(rule) = object.rule {
            self.rule(&rule);
        }
    }

    fn map(&mut self, map: MapObject) {
        let mut rows = Vec::with_capacity(map.elem.len());
        for element in &map.elem {
            let Some([key, verdict]) = element.as_array().map(Vec::as_slice) else { continue };
            // With a comment, a counter or a timeout it is one level deeper.
            let key = key.pointer("/elem/val").unwrap_or(key);
            match self.portal(key) {
                Some(key) => rows.push((key, self.verdict(verdict), label(verdict))),
                None => remark(&mut self.rules.remarks, "an element of a map is not understood", &element.to_string()),
            }
        }
        self.maps.insert(map.name, rows);
    }

    /// "address . protocol . port", or without the address.
    fn portal(&self, key: &Value) -> Option<FrontendKey> {
        let parts = key.get("concat")?.as_array()?;
        let (ip, rest) = match parts.as_slice() {
            [ip, rest @ ..] if rest.len() == 2 => (ip.as_str()?.parse().ok()?, rest),
            rest => (Ipx::any(self.family), rest),
        };
        let [of, port] = rest else { return None };
        let number = of.as_u64().map(|number| number.to_string());
        let of = protocol(of.as_str().or(number.as_deref())?)?;
        Some(FrontendKey::new(ip, port.as_u64()?.try_into().ok()?, of))
    }

    fn verdict(&mut self, verdict: &Value) -> Then {
        let Some((kind, value)) = verdict.as_object().and_then(|object| object.iter().next()) else {
            return Then::Unknown;
        };
        let target = value.get("target").and_then(Value::as_str);
        match (kind.as_str(), target) {
            ("goto", Some(chain)) => Then::Goto(self.chains.id(chain)),
            ("jump", Some(chain)) => Then::Jump(self.chains.id(chain)),
            ("drop", _) => Then::Drop,
            ("reject", _) => Then::Refuse,
            ("return", _) => Then::Return,
            ("mangle" | "set" | "masquerade" | "counter" | "log" | "continue", _) => Then::Nothing,
            ("dnat", _) => dnat(value).map_or(Then::Unknown, Then::Translate),
            ("vmap", _) => self.draw(value).unwrap_or(Then::Unknown),
            _ => Then::Unknown,
        }
    }

    /// `numgen random mod N vmap { 0 : goto CHAIN, ... }`.
    fn draw(&mut self, vmap: &Value) -> Option<Then> {
        vmap.pointer("/key/numgen").filter(|numgen| is_random(numgen))?;
        let mut chains = Vec::new();
        for pair in vmap.pointer("/data/set")?.as_array()? {
            let target = pair.get(1)?.pointer("/goto/target")?.as_str()?;
            chains.push(self.chains.id(target));
        }
        Some(Then::GotoOneOf(chains.into()))
    }

    fn rule(&mut self, rule: &RuleObject) {
        let chain = self.chains.id(&rule.chain);
        let mut when = When::Always;
        let mut then = Then::Nothing;
        for expression in &rule.expr {
            if let Some(condition) = expression.get("match") {
                when = both(when, self.condition(condition));
            } else if let Some(look_up) = look_up(expression, chain) {
                return self.look_ups.push(look_up);
            } else {
                match (self.verdict(expression), &then) {
                    (Then::Nothing, _) => {}
                    (next, Then::Nothing) => then = next,
                    _ => then = Then::Unknown,
                }
            }
        }
        self.chains.append(chain, Rule { when, then });
    }

    fn condition(&self, condition: &Value) -> When {
        let is_equal = match condition.get("op").and_then(Value::as_str) {
            Some("==" | "in") => true,
            Some("!=") => false,
            _ => return When::Unknown,
        };
        let (Some(left), Some(right)) = (condition.get("left"), condition.get("right")) else { return When::Unknown };
        let field = left.pointer("/payload/field").and_then(Value::as_str);
        let is_source_type = left.pointer("/fib/result").is_some_and(|result| result == "type")
            && left.pointer("/fib/flags").is_some_and(|flags| flags.to_string().contains("saddr"));
        match (field, right.as_str()) {
            (Some("saddr"), Some(set)) if is_equal && set.starts_with('@') => {
                self.timeouts.get(&set[1..]).map_or(When::Unknown, |seconds| When::Recent(*seconds))
            }
            (Some("saddr"), _) if is_equal => When::Source,
            (Some("saddr"), _) => When::OtherSource,
            (None, Some("local")) if is_source_type && is_equal => When::Local,
            // The Service's own protocol.
            (None, _) if is_equal && left.pointer("/meta/key").is_some_and(|key| key == "l4proto") => When::Always,
            _ => When::Unknown,
        }
    }

    fn finish(mut self) -> Rules {
        let mut destinations = Destinations::default();
        let mut used = HashMap::default();
        for (hook, is_nat) in &self.hooks {
            let jumps = self.chains.rules(*hook).iter().filter_map(|rule| match rule.then {
                Then::Jump(chain) | Then::Goto(chain) => Some(chain),
                _ => None,
            });
            for chain in std::iter::once(*hook).chain(jumps) {
                for look_up in self.look_ups.iter().filter(|look_up| look_up.chain == chain) {
                    used.insert((look_up.map.clone(), *is_nat), look_up.has_address);
                }
            }
        }
        for ((map, is_nat), has_address) in used {
            for (key, then, label) in self.maps.get(&map).into_iter().flatten() {
                if key.ip().to_ip().is_unspecified() == has_address {
                    remark(&mut self.rules.remarks, "a map is looked up by other keys than it has", &map);
                    continue;
                }
                let rule = Rule { when: When::Always, then: then.clone() };
                destinations.add(*key, is_nat, rule, label);
            }
        }
        destinations.finish(&self.chains, &mut self.rules);
        self.rules
    }
}

/// `KEY vmap @NAME`, of a destination.
fn look_up(expression: &Value, chain: u32) -> Option<LookUp> {
    let vmap = expression.get("vmap")?;
    let map = vmap.get("data")?.as_str()?.strip_prefix('@')?.to_owned();
    let has_address = vmap.get("key")?.to_string().contains("\"daddr\"");
    Some(LookUp { chain, map, has_address })
}

fn both(a: When, b: When) -> When {
    match (a, b) {
        (When::Always, other) | (other, When::Always) => other,
        _ => When::Unknown,
    }
}

fn is_random(numgen: &Value) -> bool {
    numgen.get("mode").is_some_and(|mode| mode == "random")
}

/// `dnat to ADDRESS:PORT`, or to one of a map at random.
fn dnat(value: &Value) -> Option<Box<[SocketAddrx]>> {
    let at = |ip: &Value, port: &Value| {
        Some(SocketAddrx { ip: ip.as_str()?.parse().ok()?, port: port.as_u64()?.try_into().ok()? })
    };
    let address = value.get("addr")?;
    if address.is_string() {
        return Some([at(address, value.get("port")?)?].into());
    }
    address.pointer("/map/key/numgen").filter(|numgen| is_random(numgen))?;
    let pairs = address.pointer("/map/data/set")?.as_array()?;
    let target = |pair: &Value| match pair.get(1)?.get("concat")?.as_array()?.as_slice() {
        [ip, port] => at(ip, port),
        _ => None,
    };
    pairs.iter().map(target).collect()
}

/// Chains are named PURPOSE-HASH-namespace/name/protocol/port: what follows the hash, for people.
fn label(verdict: &Value) -> String {
    let target = verdict.pointer("/goto/target").and_then(Value::as_str).unwrap_or_default();
    let name = target.splitn(3, '-').nth(2).unwrap_or_default();
    match name.split('/').collect::<Vec<_>>().as_slice() {
        [namespace, name, _, ""] => format!("{namespace}/{name}"),
        [namespace, name, _, port] => format!("{namespace}/{name}:{port}"),
        _ => String::new(),
    }
}
