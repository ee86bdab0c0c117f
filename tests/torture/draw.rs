//! Chance that can be repeated.

use std::time::SystemTime;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Points of each kind of run, instead of so many; 0: all.
pub fn points(usual: usize) -> usize {
    setting("KUBELANE_POINTS").map_or(usual, |points| points as usize)
}

/// Numbers by chance (splitmix64).
pub struct Draw(u64);

impl Draw {
    /// From KUBELANE_SEED, or from the clock; prints which.
    pub fn new() -> Draw {
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = setting("KUBELANE_SEED").unwrap_or(clock);
        println!("KUBELANE_SEED={seed}");
        Draw(seed)
    }

    /// A number below `most`.
    pub fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ value >> 31) as usize % most
    }

    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// [`points`] of so many, or each once.
    pub fn places(&mut self, usual: usize, of: usize) -> Vec<usize> {
        match points(usual) {
            0 => (0..of).collect(),
            points => (0..points).map(|_| self.below(of)).collect(),
        }
    }
}
