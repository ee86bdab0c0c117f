//! What the running kernel's verifier says about each program: whether it is taken, and what it costs to check.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use anyhow::{Context, Result, bail};
use libbpf_rs::AsRawLibbpf;
use libbpf_rs::skel::OpenSkel;

use super::object::{btf_stand_in, open_object};
use super::probe;
use super::signals::uninterrupted;

/// BPF_LOG_STATS of linux/bpf_verifier.h (5.2): a few lines of figures, and the reason when a program is refused.
const LOG_STATISTICS: u32 = 4;
const LOG_BYTES: usize = 64 << 10;

/// One program, as the verifier saw it.
#[derive(Clone, Debug)]
pub struct VerifiedProgram {
    pub name: String,
    /// Instructions that the verifier walked through, over all paths; the kernel's limit is one million.
    pub instructions: u32,
    /// Bytes of stack of each function, the program itself first; 512 are all that nested calls may have together.
    pub frames: Vec<u32>,
    /// Bytes that the deepest calls have together, where the kernel says so (seen on 7.2, not on 6.18).
    pub deepest: Option<u32>,
}

impl VerifiedProgram {
    /// "96"; for a program that calls functions "max 400", all together, or else "232 (of 26)", the largest of so many.
    pub fn stack(&self) -> String {
        let largest = self.frames.iter().max().unwrap_or(&0);
        match (self.deepest, self.frames.len()) {
            (Some(deepest), 2..) => format!("max {deepest}"),
            (None, functions @ 2..) => format!("{largest} (of {functions})"),
            _ => largest.to_string(),
        }
    }
}

/// Loads every program that this kernel is meant to take, with maps of its own, attaches none and lets all go.
pub fn verify_all() -> Result<Vec<VerifiedProgram>> {
    let mut storage = MaybeUninit::uninit();
    let btf = btf_stand_in()?;
    let mut skeleton = open_object(&mut storage, btf.as_ref(), probe::socket_search())?;
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
    let loaded = uninterrupted(|| skeleton.load());
    let mut logs = logs.into_iter().map(|(name, log)| (name, text(&log)));
    match loaded {
        Ok(_) => logs.map(|(name, log)| parse(name, &log)).collect(),
        Err(error) => {
            let refused = logs.rfind(|(_, log)| !log.is_empty());
            let (name, log) = refused.unwrap_or_else(|| ("nothing".into(), String::new()));
            Err(error).with_context(|| format!("the kernel rejected the BPF object; last seen: {name}\n{log}"))
        }
    }
}

fn text(log: &[u8]) -> String {
    CStr::from_bytes_until_nul(log).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The figures of a log:
///
/// ```text
/// verification time 1144880 usec
/// stack depth 96+40 max 136
/// insns processed 1200+34
/// processed 1234 insns (limit 1000000) max_states_per_insn 27 ...
/// ```
///
/// "max" and the third line are newer than 6.18; log lines of the program's own may come before.
fn parse(name: String, log: &str) -> Result<VerifiedProgram> {
    let words = |mark: &str| log.lines().rev().find_map(|line| line.strip_prefix(mark)).map(str::split_whitespace);
    let instructions = words("processed ").and_then(|mut words| words.next()?.parse().ok());
    let frames = words("stack depth ").and_then(|mut words| words.next()?.split('+').map(|n| n.parse().ok()).collect());
    let deepest = words("stack depth ").and_then(|words| words.skip_while(|w| *w != "max").nth(1)?.parse().ok());
    let (Some(instructions), Some(frames)) = (instructions, frames) else {
        bail!("the verifier's log of {name} has no figures: {log:?}");
    };
    Ok(VerifiedProgram { name, instructions, frames, deepest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_found_in_the_logs_of_old_and_new_kernels() {
        let end = "processed 1234 insns (limit 1000000) max_states_per_insn 27 total_states 98 peak_states 9\n";
        for (middle, frames, deepest, stack) in [
            ("stack depth 96\n", vec![96], None, "96"),
            ("stack depth 16+128+0\n", vec![16, 128, 0], None, "128 (of 3)"),
            ("stack depth 16+128+0 max 144\ninsns processed 1200+34\n", vec![16, 128, 0], Some(144), "max 144"),
            ("stack depth 96 max 96\ninsns processed 1234\n", vec![96], Some(96), "96"),
        ] {
            let program = parse("p".into(), &format!("verification time 7 usec\n{middle}{end}")).unwrap();
            assert_eq!((program.instructions, &program.frames, program.deepest), (1234, &frames, deepest), "{middle}");
            assert_eq!(program.stack(), stack);
        }
        assert!(parse("p".into(), "stack depth 9\n").is_err());
        assert!(parse("p".into(), end).is_err());
    }
}
