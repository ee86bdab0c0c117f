//! Names of devices as flags give them: `eth0,bond*,cali?????`.

use std::str::FromStr;

use super::NetDevice;

/// Patterns for names of devices: `*` stands for any number of characters, `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Globs(Vec<String>);

impl Globs {
    /// Whether one of them matches the device's name.
    pub fn name(&self, device: &NetDevice) -> bool {
        self.0.iter().any(|glob| matches_glob(glob.as_bytes(), device.name.as_bytes()))
    }
}

impl FromStr for Globs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let globs: Vec<String> = text.split(',').map(|glob| glob.trim().to_owned()).collect();
        match globs.iter().any(|glob| glob.is_empty() || glob.contains(['/', ' '])) {
            true => Err(format!("{text:?} is not a list of device names, such as eth0,bond*,vxlan.calico")),
            false => Ok(Globs(globs)),
        }
    }
}

fn matches_glob(glob: &[u8], name: &[u8]) -> bool {
    match (glob, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| matches_glob(rest, &name[skipped..])),
        ([b'?', glob @ ..], [_, name @ ..]) => matches_glob(glob, name),
        ([a, glob @ ..], [b, name @ ..]) => a == b && matches_glob(glob, name),
        _ => false,
    }
}
