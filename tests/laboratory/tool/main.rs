//! `kubelane-lab`: the laboratory's tool. Servers, clients and load for pods, the way into a place, the demo, the sweep.
//!
//! A test tool: built with the feature `lab`, never installed on a node.

mod client;
mod contain;
mod demo;
mod enter;
mod http;
#[path = "../mod.rs"]
mod laboratory;
mod load;
mod serve;
mod tap;
mod witness;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "kubelane-lab", about = "Network laboratory of the kubelane project: demo, servers, clients", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lay out two nodes with pods, run kubelane on both, and show that Services work.
    Demo {
        /// Directory of the demo's Services and EndpointSlices.
        #[arg(long, default_value = "manifests/demo")]
        manifests: PathBuf,
    },
    /// Remove what laboratories of dead processes left behind.
    Sweep,
    /// Join a cgroup and a network namespace, then become COMMAND.
    Enter {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Become COMMAND in a container as the DaemonSet describes it.
    Contain(contain::Options),
    /// Answer everything with NAME; prints "ready" when all sockets listen.
    Serve(serve::Options),
    /// Make sockets as told on stdin, one JSON object a line, and say what came of it on stdout.
    Client,
    /// Be a pod with a TCP/IP stack of its own, behind a new tap device of this namespace. Prints "ready" when the device
    /// is there; then as `client`.
    TapPod(tap::Options),
    /// Make HTTP requests one after another until stdin closes; one JSON record a line on stdout.
    Load {
        #[arg(long)]
        to: SocketAddr,
        /// Pause between two requests, in milliseconds.
        #[arg(long, default_value_t = 1)]
        pause: u64,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo { manifests } => demo::run(&manifests),
        Command::Sweep => sweep(),
        Command::Enter { netns, cgroup, command } => enter::run(&netns, &cgroup, &command),
        Command::Contain(options) => contain::run(&options),
        Command::Serve(options) => serve::run(&options),
        Command::Client => client::run(),
        Command::TapPod(options) => tap::run(&options),
        Command::Load { to, pause } => load::run(to, pause),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kubelane-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn sweep() -> anyhow::Result<()> {
    laboratory::preflight()?;
    let swept = laboratory::sweep::sweep()?;
    for id in &swept {
        println!("removed laboratory {id}");
    }
    println!("{} left by dead processes", swept.len());
    Ok(())
}
