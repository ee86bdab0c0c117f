//! Giving memory back.

/// Returns what the allocator holds free to the kernel (malloc_trim(3)): the first sync parses a whole cluster, and
/// nothing afterwards needs as much. Does nothing with an allocator that has no such call.
pub fn release() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
