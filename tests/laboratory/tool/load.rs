//! A stream of HTTP requests whose every outcome is told, so that a change under load can be judged request by request.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::http;
use crate::laboratory::load::now_micros;
use crate::laboratory::messages::LoadRecord;

pub fn run(to: SocketAddr, pause: u64) -> anyhow::Result<()> {
    static STOP: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        STOP.store(true, Ordering::Relaxed);
    });
    let mut out = std::io::stdout().lock();
    while !STOP.load(Ordering::Relaxed) {
        let (began, clock) = (now_micros()?, Instant::now());
        let result = http::get(to).map_err(|error| http::error_name(&error));
        let record = LoadRecord { began, micros: clock.elapsed().as_micros().try_into()?, result };
        serde_json::to_writer(&mut out, &record)?;
        out.write_all(b"\n")?;
        std::thread::sleep(Duration::from_millis(pause));
    }
    Ok(())
}
