//! What the running kernel's verifier says about each program: whether it is taken, and what it costs to check.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use anyhow::{Context, Result, bail};
use libbpf_rs::AsRawLibbpf;
use libbpf_rs::skel::OpenSkel;

use super::load::{btf_stand_in, open_object};

/// BPF_LOG_STATS of linux/bpf_verifier.h (5.2): a few lines of figures, and the reason when a program is refused.
const LOG_STATISTICS: u32 = 4;
const LOG_BYTES: usize = 64 << 10;

/// One program, as the verifier saw it.
#[derive(Clone, Debug)]
pub struct VerifiedProgram {
    pub name: String,
    /// Instructions that the verifier walked through, over all paths; the kernel's limit is one million.
    pub instructions: u32,
    /// Bytes of stack, of 512: "96", or "96+40" for a program that calls functions.
    pub stack: String,
}

/// Loads every program that this kernel is meant to take, with maps of its own, attaches none and lets all go.
pub fn verify_all() -> Result<Vec<VerifiedProgram>> {
    let mut storage = MaybeUninit::uninit();
    let btf = btf_stand_in()?;
    let mut skeleton = open_object(&mut storage, btf.as_ref())?;
    let mut logs: Vec<(String, Vec<u8>)> = Vec::new();
    for mut program in skeleton.open_object_mut().progs_mut().filter(|p| p.autoload()) {
        let mut log = vec![0u8; LOG_BYTES];
        program.set_log_level(LOG_STATISTICS);
        // SAFETY: the program is alive, and the buffer's heap memory stays where it is, in `logs`, until after the load.
        let result = unsafe {
            let program = program.as_libbpf_object().as_ptr();
            libbpf_sys::bpf_program__set_log_buf(program, log.as_mut_ptr().cast(), LOG_BYTES as u64)
        };
        if result != 0 {
            bail!("cannot give {:?} a log: error {}", program.name(), -result);
        }
        logs.push((program.name().to_string_lossy().into_owned(), log));
    }
    let loaded = skeleton.load();
    let mut logs = logs.into_iter().map(|(name, log)| (name, text(&log)));
    match loaded {
        Ok(_) => logs.map(|(name, log)| parse(name, &log)).collect(),
        Err(error) => {
            let refused = logs.rfind(|(_, log)| !log.is_empty());
            let (name, log) = refused.unwrap_or_else(|| ("nothing".into(), String::new()));
            Err(error).with_context(|| format!("the kernel did not take the BPF object; last seen: {name}\n{log}"))
        }
    }
}

fn text(log: &[u8]) -> String {
    CStr::from_bytes_until_nul(log).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

/// "... stack depth 96+40 ... processed 1234 insns (limit 1000000) ..."
fn parse(name: String, log: &str) -> Result<VerifiedProgram> {
    let after = |mark: &str| Some(log.split_once(mark)?.1.split_whitespace().next()?.to_owned());
    let instructions = after("processed ").and_then(|n| n.parse().ok());
    let (Some(instructions), Some(stack)) = (instructions, after("stack depth ")) else {
        bail!("the verifier's log of {name} has no figures: {log:?}");
    };
    Ok(VerifiedProgram { name, instructions, stack })
}
