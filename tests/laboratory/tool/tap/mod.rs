//! `kubelane-lab tap-pod`: a pod that is no process of this kernel.
//!
//! Its TCP/IP stack (smoltcp) runs in this process, and all that it has of this machine's network is the file descriptor
//! of a tap device: as a virtual machine, or gVisor, whose sockets no kernel but their own has seen. It asks as told on
//! stdin, like `kubelane-lab client`, and serves at the same time.

mod device;
mod errors;
mod offload;
mod serve;
mod sockets;
mod stack;

use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::Context as _;
use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};

use crate::http;
use crate::laboratory::messages::{Answer, Reply, Request};
use device::Tap;
use sockets::Sockets;
use stack::Stack;

#[derive(clap::Args)]
pub struct Options {
    /// The tap device to make.
    #[arg(long)]
    device: String,
    /// What every answer says.
    #[arg(long)]
    name: String,
    /// An address of the pod with the prefix of what is on the link: one of each family.
    #[arg(long, required = true)]
    address: Vec<IpNet>,
    /// Where everything else goes: one of each family. An IPv4 gateway that is not on the link is reached all the same.
    #[arg(long, required = true)]
    gateway: Vec<IpAddr>,
    #[arg(long, default_value_t = 1500)]
    mtu: usize,
    /// Leave checksums and the segments of TCP to the device, as a virtual machine does.
    #[arg(long)]
    offloads: bool,
    /// TCP and UDP: answers say who this is and who the client is.
    #[arg(long)]
    seen: Vec<u16>,
    /// TCP: what comes in goes back.
    #[arg(long)]
    echo: Vec<u16>,
}

/// Serves, and does what stdin says, until stdin closes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let tap = Tap::open(&options.device, options.mtu, options.offloads)?;
    // The device stays where it is. This process has no network from here on, and its descriptor only.
    unshare(CloneFlags::CLONE_NEWNET).context("leaving the node's namespace")?;
    let mut stack = Stack::new(tap, options)?;
    let mut sockets = Sockets::default();
    println!("ready");
    let (mut input, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        stack.turn()?;
        if !stack.wait(None, Some(io::stdin().as_fd()))? {
            continue;
        }
        let length = io::stdin().lock().read(&mut chunk).context("reading stdin")?;
        if length == 0 {
            return Ok(());
        }
        input.extend_from_slice(&chunk[..length]);
        while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = input.drain(..=end).collect();
            answer(&mut sockets, &mut stack, &line)?;
        }
    }
}

fn answer(sockets: &mut Sockets, stack: &mut Stack, line: &[u8]) -> anyhow::Result<()> {
    let request: Request = serde_json::from_slice(line).context("understanding a request")?;
    let began = Instant::now();
    let reply = sockets.perform(stack, &request);
    let micros = began.elapsed().as_micros().try_into()?;
    let reply = reply.unwrap_or_else(|error| Reply::Failed { errno: http::error_name(&error) });
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &Answer { micros, reply })?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}
