//! What goes wrong around a daemon goes wrong here, while real sockets of a pod and of a client outside ask: it is killed at
//! its system calls, the kernel refuses them, its BPF file system or its API server goes away, memory runs out, another daemon
//! starts beside it, its maps grow, its wall clock is set, and an earlier version has left its own. Connections to Services that do not change never fail, and afterwards all is right again.
//!
//! What goes wrong is drawn; a run prints its seed. `KUBELANE_SEED=N` repeats it, `KUBELANE_POINTS=N` takes so many points
//! of each kind of run (0: all of them).

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod bpffs;
mod changes;
mod clock;
mod draw;
mod faults;
mod former;
mod growth;
mod kills;
mod memory;
mod outage;
mod services;
mod traced;
mod two;
mod upgrade;
