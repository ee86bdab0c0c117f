//! How long the directory source takes to read and send a world of 10,000 Services with 10 endpoints each, with how much
//! memory, and how long one changed file takes from its rename to the change. Prints; asserts nothing about time.

mod generator;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use generator::World;
use kubelane::files;
use kubelane::k8s::{Settings, SourceStatus};
use kubelane::model::{Change, Kind};
use tokio::sync::mpsc;

const WORLD: World = World { services: 10_000, endpoints: 10 };
const CHANGES: usize = 200;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let files = tempfile::tempdir()?;
    WORLD.write_files(files.path())?;
    runtime.block_on(measure("a file per Service", files.path()))?;
    let lists = tempfile::tempdir()?;
    WORLD.write_lists(lists.path(), 4)?;
    runtime.block_on(measure("four lists", lists.path()))
}

async fn measure(what: &str, directory: &Path) -> anyhow::Result<()> {
    let before = resident();
    let started = Instant::now();
    let (sender, mut changes) = mpsc::channel(1024);
    let status = Arc::new(SourceStatus::default());
    let source = tokio::spawn(files::run(directory.to_owned(), Settings::default(), sender, status));
    let mut world = Vec::with_capacity(2 * WORLD.services);
    while let Some(change) = changes.recv().await {
        match change {
            Change::ListEnd(Kind::Node) => break,
            change => world.push(change),
        }
    }
    let elapsed = started.elapsed();
    let services = world.iter().filter(|c| matches!(c, Change::Service(_))).count();
    println!("{what}: {services} Services in {elapsed:.0?}; resident {before} -> {} MiB with the records", resident());
    if directory.join("service-00000.yaml").exists() {
        follow(what, directory, &mut changes).await?;
    }
    drop(changes);
    source.await?
}

/// Changes one file after the other, and waits for each.
async fn follow(what: &str, directory: &Path, changes: &mut mpsc::Receiver<Change>) -> anyhow::Result<()> {
    let mut times = Vec::with_capacity(CHANGES);
    for number in 0..CHANGES {
        let object = number % WORLD.services;
        let text = format!("{}---\n{}", generator::service(object), WORLD.slice(object, 1));
        let name = format!("service-{object:05}.yaml");
        let temporary = directory.join(".next");
        std::fs::write(&temporary, text)?;
        let started = Instant::now();
        std::fs::rename(&temporary, directory.join(name))?;
        match tokio::time::timeout(Duration::from_secs(5), changes.recv()).await {
            Ok(Some(_)) => times.push(started.elapsed()),
            _ => break,
        }
    }
    times.sort_unstable();
    if let (Some(median), Some(worst)) = (times.get(times.len() / 2), times.last()) {
        println!("{what}: from a rename to its change: median {median:.0?}, worst {worst:.0?} of {}", times.len());
    }
    Ok(())
}

/// Resident memory of this process, in MiB.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = statm.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    (pages * 4096) >> 20
}
