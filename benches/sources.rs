//! How long the directory source takes to read and send a world of 10,000 Services with 10 endpoints each, with how much
//! memory, and how long one changed Service takes from the rename of its file to the change, and how much processor
//! time. Prints; asserts nothing about time.

mod generator;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use generator::World;
use kubelane::files;
use kubelane::model::{Change, Kind};
use kubelane::objects::{Settings, SourceStatus};
use tokio::sync::mpsc;

const WORLD: World = World { services: 10_000, endpoints: 10 };
const LISTS: usize = 10;
const CHANGES: usize = 200;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let files = tempfile::tempdir()?;
    WORLD.write_files(files.path())?;
    runtime.block_on(measure("a file per Service", files.path()))?;
    let lists = tempfile::tempdir()?;
    WORLD.write_lists(lists.path(), LISTS)?;
    runtime.block_on(measure("ten lists", lists.path()))
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
    let one_each = directory.join("service-00000.yaml").exists();
    follow(what, one_each, directory, &mut changes).await?;
    drop(changes);
    source.await?
}

/// Changes one Service after the other, and waits for each.
async fn follow(
    what: &str,
    one_each: bool,
    directory: &Path,
    changes: &mut mpsc::Receiver<Change>,
) -> anyhow::Result<()> {
    let (mut times, mut used) = (Vec::with_capacity(CHANGES), Vec::with_capacity(CHANGES));
    for number in 0..CHANGES {
        let (name, text) = match one_each {
            true => {
                let text = format!("{}---\n{}", generator::service(number), WORLD.slice(number, 1));
                (format!("service-{number:05}.yaml"), text)
            }
            false => {
                // The first Service of the list gets another first endpoint each time.
                let name = format!("list-{}.yaml", number % LISTS);
                let text = std::fs::read_to_string(directory.join(&name))?;
                let (old, new) = (250 + number / LISTS % 5, 250 + (number / LISTS + 1) % 5);
                (name, text.replacen(&format!(".{old}\n"), &format!(".{new}\n"), 1))
            }
        };
        let temporary = directory.join(".next");
        std::fs::write(&temporary, text)?;
        let (started, before) = (Instant::now(), processor_time()?);
        std::fs::rename(&temporary, directory.join(name))?;
        match tokio::time::timeout(Duration::from_secs(5), changes.recv()).await {
            Ok(Some(_)) => times.push(started.elapsed()),
            _ => anyhow::bail!("{what}: change {number} did not arrive"),
        }
        used.push(processor_time()?.saturating_sub(before));
    }
    times.sort_unstable();
    used.sort_unstable();
    let (median, worst, processor) = (times[CHANGES / 2], times[CHANGES - 1], used[CHANGES / 2]);
    println!(
        "{what}: from a rename to its change, {CHANGES} times: median {median:.0?}, worst {worst:.0?}; processor time: \
         best {:.2?}, median {processor:.2?}",
        used[0]
    );
    Ok(())
}

/// What this process has used of the processors.
fn processor_time() -> anyhow::Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// Resident memory of this process, in MiB.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = statm.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    (pages * 4096) >> 20
}
