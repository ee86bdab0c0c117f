//! IPsec policies (XFRM) of the daemon's network namespace, live: packets that the programs send on themselves would not
//! follow them.

use anyhow::Context as _;
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::protocols::NETLINK_XFRM;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};
use tokio::time::sleep;
use tracing::warn;

use super::REOPEN_PAUSE;

/// linux/xfrm.h: the multicast group, and message types.
const XFRMNLGRP_POLICY: u32 = 4;
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
/// linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// Where struct xfrm_userpolicy_info has `dir`: behind the selector (56 bytes), both lifetimes (64 and 32), priority and
/// index.
const DIRECTION: usize = HEADER + 56 + 64 + 32 + 8;
/// XFRM_POLICY_OUT and XFRM_POLICY_FWD. What comes in is judged by sockets, and those of sockets are not listed.
const FOLLOWED: [u8; 2] = [1, 2];

/// Calls `changed` with whether there is any policy for what leaves or is forwarded: at once, and after each change. Runs
/// for ever; on a kernel without IPsec it says no and waits.
pub async fn follow_policies(mut changed: impl FnMut(bool)) {
    let mut told = false;
    loop {
        if let Err(error) = follow(&mut changed).await {
            let is_unknown = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error)
                == Some(libc::EPROTONOSUPPORT);
            if is_unknown {
                changed(false);
                return std::future::pending().await;
            }
            if !std::mem::replace(&mut told, true) {
                warn!("IPsec policies: {error:#}; trying again (what was known last stays in force)");
            }
        }
        sleep(REOPEN_PAUSE).await;
    }
}

/// Returns when the socket broke.
async fn follow(changed: &mut impl FnMut(bool)) -> anyhow::Result<()> {
    let mut socket = TokioSocket::new(NETLINK_XFRM)?;
    socket.socket_mut().bind_auto().context("binding a netlink socket")?;
    socket.socket_mut().add_membership(XFRMNLGRP_POLICY).context("subscribing to changes of policies")?;
    loop {
        changed(any(&mut socket).await?);
        // Any notice will do.
        socket.recv_from_full().await.context("waiting for changes")?;
    }
}

/// Lists all policies. Notices that come between the answers are taken for such, and only mean that the next list is due.
async fn any(socket: &mut TokioSocket) -> anyhow::Result<bool> {
    const LENGTH: usize = HEADER + 64;
    let mut request = [0u8; LENGTH];
    request[..4].copy_from_slice(&(LENGTH as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&XFRM_MSG_GETPOLICY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request[8..12].copy_from_slice(&1u32.to_ne_bytes());
    socket.send(&request).await.context("asking for policies")?;
    let mut found = false;
    loop {
        let (answer, _) = socket.recv_from_full().await.context("listing policies")?;
        let mut rest = &answer[..];
        while rest.len() >= HEADER {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            anyhow::ensure!((HEADER..=rest.len()).contains(&length), "an answer that is no netlink message");
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => {
                    let code = rest[HEADER..length].first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(std::io::Error::from_raw_os_error(-code)).context("listing policies");
                }
                XFRM_MSG_NEWPOLICY => found |= rest.get(DIRECTION).is_some_and(|dir| FOLLOWED.contains(dir)),
                _ => {}
            }
            // Messages are aligned to four bytes.
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}
