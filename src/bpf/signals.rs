//! Loading without being interrupted.

use nix::sys::signal::{SigSet, SigmaskHow};

/// Loads programs with every signal held back from this thread: while one waits for it the verifier gives up (EAGAIN), and
/// libbpf tries five times only, or, where it asks what the kernel can do, takes that for an answer. (The end of another
/// thread's child is such a signal, while that thread starts the next.)
pub(super) fn uninterrupted<T>(load: impl FnOnce() -> T) -> T {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let result = load();
    // It cannot fail for a mask that the kernel has told.
    let _ = before.map(|before| before.thread_set_mask());
    result
}
