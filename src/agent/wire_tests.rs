//! The devices on a model of the hooks.

use std::time::Duration;

use super::*;

const FIRST: Duration = Duration::from_millis(100);

/// In how many milliseconds it is to be called again.
fn due_in(wire: &Wire<'_>, now: Instant) -> Option<u128> {
    wire.due().map(|due| (due - now).as_millis())
}

#[derive(Default)]
struct Model {
    attached: BTreeMap<u32, Device>,
    refuses: BTreeSet<u32>,
    /// As soon as it is attached.
    taken_off: bool,
    calls: usize,
}

impl Hooks for Model {
    fn attach(&mut self, device: &Device) -> anyhow::Result<Attached> {
        self.calls += 1;
        anyhow::ensure!(!self.refuses.contains(&device.index), "no such device");
        let before = self.attached.insert(device.index, device.clone());
        Ok(if before.is_some() { Attached::Replaced } else { Attached::New })
    }

    fn detach(&mut self, index: u32) -> anyhow::Result<()> {
        self.calls += 1;
        anyhow::ensure!(!self.refuses.contains(&index), "busy");
        self.attached.remove(&index);
        Ok(())
    }

    fn attached(&self) -> anyhow::Result<Vec<u32>> {
        Ok(self.attached.keys().copied().collect())
    }

    fn faults(&self, device: &Device) -> anyhow::Result<Vec<Fault>> {
        anyhow::ensure!(!self.refuses.contains(&device.index), "no such device");
        Ok(if self.taken_off { vec![Fault::Detached(Direction::In)] } else { vec![] })
    }
}

fn device(index: u32, address: &str) -> NetDevice {
    NetDevice {
        has_default_route: true,
        addresses: vec![address.parse().unwrap()],
        has_subnet: true,
        ..NetDevice::for_test(index, &format!("eth{index}"), None)
    }
}

fn model(hooks: &Model) -> Vec<u32> {
    hooks.attached.keys().copied().collect()
}

#[test]
fn devices_are_attached_once_again_when_addresses_change_and_detached_when_they_go() {
    let mut hooks = Model::default();
    // Left by an earlier daemon.
    let left = device(9, "192.0.2.9");
    hooks.attached.insert(9, hook_of(&left));
    let (one, two, now) = (device(1, "192.0.2.1"), device(2, "2001:db8::2"), Instant::now());
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one, &two], &[], now);
    wire.follow(&[&one, &two], &[], now);
    assert_eq!(wire.due(), None);
    assert_eq!((model(&hooks), hooks.calls), (vec![1, 2], 3));
    assert_eq!(hooks.attached[&2].ip6, Some("2001:db8::2".parse().unwrap()));

    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one, &two], &[], now);
    let moved = device(2, "192.0.2.2");
    wire.follow(&[&one, &moved], &[], now);
    wire.follow(&[&moved], &[], now);
    assert_eq!((model(&hooks), hooks.calls), (vec![2], 7));
    assert_eq!((hooks.attached[&2].ip4, hooks.attached[&2].ip6), (Some([192, 0, 2, 2].into()), None));
}

#[test]
fn a_device_that_fails_disturbs_no_other_and_is_tried_again() {
    let mut hooks = Model { refuses: [1].into(), ..Model::default() };
    let (one, two, now) = (device(1, "192.0.2.1"), device(2, "192.0.2.2"), Instant::now());
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one, &two], &[], now);
    assert_eq!(due_in(&wire, now), Some(100));
    wire.follow(&[&one, &two], &[], now + FIRST);
    assert_eq!(due_in(&wire, now + FIRST), Some(200), "later and later");
    assert_eq!((model(&hooks), hooks.calls), (vec![2], 3));

    hooks.refuses.clear();
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one, &two], &[], now);
    assert_eq!(wire.due(), None);
    assert_eq!(model(&hooks), [1, 2]);
}

#[test]
fn a_device_that_cannot_be_detached_is_tried_again() {
    let mut hooks = Model { refuses: [1].into(), ..Model::default() };
    hooks.attached.insert(1, hook_of(&device(1, "192.0.2.1")));
    let now = Instant::now();
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[], &[], now);
    wire.follow(&[], &[], now);
    assert_eq!(due_in(&wire, now), Some(100));
    assert_eq!((model(&hooks), hooks.calls), (vec![1], 2));
}

#[test]
fn what_is_taken_off_a_device_is_put_back_until_it_is_a_contest_and_again_when_that_is_over() {
    let mut hooks = Model { taken_off: true, ..Model::default() };
    let (one, now) = (device(1, "192.0.2.1"), Instant::now());
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one], &[], now);
    for second in 0..20 {
        wire.audit(now + Duration::from_secs(second));
    }
    assert_eq!((wire.due(), hooks.calls), (None, 6), "attached once, put back five times");

    hooks.taken_off = false;
    let mut wire = Wire::new(&mut hooks);
    wire.follow(&[&one], &[], now);
    wire.audit(now);
    assert_eq!(hooks.calls, 7, "what is in its place is left there");
}

#[test]
fn a_device_that_cannot_be_looked_at_is_attached_anew_by_the_next_round() {
    let mut hooks = Model::default();
    let (one, now) = (device(1, "192.0.2.1"), Instant::now());
    Wire::new(&mut hooks).follow(&[&one], &[], now);
    hooks.refuses.insert(1);
    let (listeners, told) = watch::channel(None);
    let mut wire = Wire::new(&mut hooks).telling(Conditions::default(), listeners);
    wire.attached.insert(1, (hook_of(&one), one.name.clone()));
    wire.adopted = true;
    wire.audit(now);
    assert_eq!(due_in(&wire, now), Some(100));
    let error = wire.explain(&anyhow::anyhow!("busy"), &hook_of(&one));
    assert_eq!(error, "busy; what was attached there before still serves; trying again");
    wire.follow(&[&one], &[], now + FIRST);
    assert_eq!((due_in(&wire, now + FIRST), hooks.calls), (Some(200), 2));
    assert_eq!(told.borrow().as_deref(), Some([(hook_of(&one), one.name.clone())].as_slice()), "still a device");
}
