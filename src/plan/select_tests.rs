//! Endpoint selection in tables: one row is one situation, written as the endpoints are and as the sets come out.

use super::*;

/// "r" ready, "t" serving and terminating, "x" neither; "@" on this node; "z=a,b" zone hints; "n=a,b" node hints.
fn hints_of(words: &[&str]) -> Option<Hints> {
    let list = |prefix: &str| -> Box<[std::sync::Arc<str>]> {
        let found = words.iter().find_map(|w| w.strip_prefix(prefix));
        found.map(|w| w.split(',').map(Into::into).collect()).unwrap_or_default()
    };
    let hints = Hints { zones: list("z="), nodes: list("n=") };
    (hints != Hints::default()).then_some(hints)
}

fn candidate<'a>(number: u32, text: &str, hints: &'a Option<Hints>) -> Candidate<'a> {
    let words: Vec<&str> = text.split_whitespace().collect();
    Candidate {
        at: SocketAddrx { ip: std::net::Ipv4Addr::from(0x0a00_0000 + number).into(), port: 80 },
        ready: words[0] == "r",
        serving: words[0] != "x",
        terminating: words[0] == "t",
        node_local: words.contains(&"@"),
        hints: hints.as_ref(),
    }
}

/// The sets of each candidate, as bits of `abi::pool_member`.
fn select(candidates: &[Candidate], place: Place, needed: u32) -> Vec<u8> {
    let choice = choose(candidates, place);
    candidates.iter().map(|candidate| choice.sets(candidate, place, needed)).collect()
}

/// The sets as numbers of the endpoints in `text` (endpoints are separated by " | "), from node "here" in zone "a".
fn sets(text: &str, zone: Option<&str>) -> (Vec<usize>, Vec<usize>) {
    let parsed: Vec<(Vec<&str>, Option<Hints>)> = text
        .split('|')
        .filter(|t| !t.trim().is_empty())
        .map(|t| t.split_whitespace().collect::<Vec<_>>())
        .map(|words| (words.clone(), hints_of(&words)))
        .collect();
    let parts = text.split('|').filter(|t| !t.trim().is_empty());
    let candidates: Vec<Candidate> =
        (0u32..).zip(parts.zip(&parsed)).map(|(i, (text, (_, hints)))| candidate(i, text.trim(), hints)).collect();
    let bits = select(&candidates, Place { node: "here", zone }, POOL_CLUSTER | POOL_LOCAL);
    let of = |set: u32| (0..bits.len()).filter(|i| u32::from(bits[*i]) & set != 0).collect();
    (of(POOL_CLUSTER), of(POOL_LOCAL))
}

#[test]
fn the_sets_are_what_kube_proxy_would_choose() {
    #[rustfmt::skip]
    let table: &[(&str, &str, &[usize], &[usize])] = &[
        ("no endpoints: both sets are empty", "", &[], &[]),
        ("ready endpoints serve, others do not", "r | x | r", &[0, 2], &[]),
        ("terminating ones wait while a ready one is there", "r | t", &[0], &[]),
        ("terminating ones serve when none is ready", "t | x | t", &[0, 2], &[]),
        ("the Local set holds this node's only", "r @ | r", &[0, 1], &[0]),
        ("the Local set falls back by itself", "r | t @", &[0], &[1]),
        ("the Cluster set counts ready ones of every node", "r @ | t @ | t", &[0], &[0]),
        ("neither ready nor serving is never local", "x @ | r", &[1], &[]),
        ("zone hints narrow the Cluster set", "r z=a | r z=b | r z=a,b", &[0, 2], &[]),
        ("zone hints do not touch the Local set", "r z=b @ | r z=a", &[1], &[0]),
        ("one ready endpoint without zone hints: hints are ignored", "r z=a | r | r z=b", &[0, 1, 2], &[]),
        ("no ready endpoint for this zone: hints are ignored", "r z=b | r z=c", &[0, 1], &[]),
        ("hints of endpoints that are not ready do not matter", "r z=a | r z=b | x | t", &[0], &[]),
        ("a hint for this zone on an endpoint that is not ready does not match", "r z=b | x z=a", &[0], &[]),
        ("node hints go before zone hints", "r n=here z=b | r n=there z=a", &[0], &[]),
        ("node hints that name other nodes only: zone hints decide", "r n=there z=a | r n=there z=b", &[0], &[]),
        ("not all have node hints: zone hints decide", "r n=here z=b | r z=a", &[1], &[]),
        ("not all have node hints and no zone hints: all serve", "r n=here | r", &[0, 1], &[]),
        ("the fallback set is not narrowed by hints", "t z=b | t z=a", &[0, 1], &[]),
    ];
    for (sentence, endpoints, cluster, local) in table {
        assert_eq!(sets(endpoints, Some("a")), (cluster.to_vec(), local.to_vec()), "{sentence}");
    }
}

#[test]
fn a_node_without_a_zone_ignores_zone_hints_but_not_node_hints() {
    assert_eq!(sets("r z=a | r z=b", None).0, [0, 1]);
    assert_eq!(sets("r n=here | r n=there", None).0, [0]);
}

#[test]
fn a_set_that_nobody_needs_is_not_decided() {
    let at = SocketAddrx { ip: "10.0.0.1".parse().unwrap(), port: 80 };
    let one = Candidate { at, ready: true, serving: true, terminating: false, node_local: true, hints: None };
    let place = Place { node: "here", zone: None };
    assert_eq!(select(&[one], place, POOL_CLUSTER), [POOL_CLUSTER as u8]);
    assert_eq!(select(&[one], place, POOL_LOCAL), [POOL_LOCAL as u8]);
    assert_eq!(select(&[one], place, 0), [0]);
}

#[test]
fn of_duplicates_the_ready_one_wins_then_the_serving_and_terminating_one() {
    let at = SocketAddrx { ip: "10.0.0.1".parse().unwrap(), port: 80 };
    let of =
        |ready, serving, terminating| Candidate { at, ready, serving, terminating, node_local: false, hints: None };
    let (ready, fallback, unready) = (of(true, true, false), of(false, true, true), of(false, false, false));
    for (all, winner) in [
        (vec![unready, fallback, ready], ready),
        (vec![unready, fallback], fallback),
        (vec![fallback, unready], fallback),
        (vec![ready, unready], ready),
    ] {
        let mut merged = all.clone();
        merge_duplicates(&mut merged);
        assert_eq!(merged, [winner], "{all:?}");
    }
}

#[test]
fn what_a_set_leaves_out_has_the_reason_that_kept_it_out() {
    use LeftOut::*;
    let words = ["r z=a", "r z=b @", "t @", "x", "r n=here z=a"];
    let hints: Vec<Option<Hints>> = words.iter().map(|text| hints_of(&text.split(' ').collect::<Vec<_>>())).collect();
    let all: Vec<Candidate> =
        (0u32..).zip(words.iter().zip(&hints)).map(|(i, (text, hints))| candidate(i, text, hints)).collect();
    let place = Place { node: "here", zone: Some("a") };
    let reasons = |all: &[Candidate]| -> (Vec<Option<LeftOut>>, Vec<Option<LeftOut>>) {
        let choice = choose(all, place);
        let cluster = all.iter().map(|c| choice.cluster(c, place).err()).collect();
        (cluster, all.iter().map(|c| choice.local(c).err()).collect())
    };
    let (cluster, local) = reasons(&all[..4]);
    assert_eq!(cluster, [None, Some(HintsOtherZones), Some(Terminating), Some(NotReady)]);
    assert_eq!(local, [Some(OtherNode), None, Some(Terminating), Some(OtherNode)]);
    assert_eq!(reasons(&all[4..]).0, [None]);
    assert_eq!(reasons(&all[2..4]), (vec![None, Some(NotReady)], vec![None, Some(OtherNode)]));
}

#[test]
fn hints_that_are_ignored_have_a_reason_and_no_hints_have_none() {
    let ignored = |texts: &[&str]| {
        let hints: Vec<Option<Hints>> = texts.iter().map(|t| hints_of(&t.split(' ').collect::<Vec<_>>())).collect();
        let mut tally = Tally::default();
        let place = Place { node: "here", zone: Some("a") };
        (0u32..).zip(texts.iter().zip(&hints)).for_each(|(i, (text, h))| tally.add(&candidate(i, text, h), place));
        tally.hints_ignored()
    };
    assert_eq!(ignored(&["r", "t"]), None);
    assert_eq!(ignored(&["r z=a", "r"]), Some(HintsIgnored::SomeHaveNone));
    assert_eq!(ignored(&["r z=b", "r z=c"]), Some(HintsIgnored::NoneIsForHere));
}
