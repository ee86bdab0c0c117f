//! When flows began, for those that end later: the datapath does not keep it.

use std::collections::HashMap;

use crate::abi::counter::{COUNTER_FLOW_LOCAL, COUNTER_FLOW_POD, COUNTER_FLOW_REMOTE};
use crate::abi::event_number::EVENT_FLOW_ENDED;
use crate::abi::{Ends, FlowKey};
use crate::bpf::Event;

/// Flows that are kept in mind. When there are as many, those of the older half of the time go.
const MOST: usize = 200_000;

#[derive(Default)]
pub struct Begun {
    flows: HashMap<FlowKey, u64>,
}

impl Begun {
    /// Of the end of a flow: when it began, in nanoseconds of CLOCK_MONOTONIC, if that was heard.
    pub fn note(&mut self, event: &Event) -> Option<u64> {
        let key = || FlowKey { ends: event.asked, protocol: event.protocol, zero: [0; 3] };
        match event.number {
            COUNTER_FLOW_LOCAL | COUNTER_FLOW_REMOTE | COUNTER_FLOW_POD => {
                if self.flows.len() >= MOST {
                    self.forget_half();
                }
                self.flows.insert(key(), event.time_ns);
                None
            }
            EVENT_FLOW_ENDED if event.asked != Ends::default() => self.flows.remove(&key()),
            _ => None,
        }
    }

    fn forget_half(&mut self) {
        let mut times: Vec<u64> = self.flows.values().copied().collect();
        let middle = times.len() / 2;
        let median = *times.select_nth_unstable(middle).1;
        self.flows.retain(|_, time| *time > median);
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    fn event(number: u32, port: u16, time_ns: u64) -> Event {
        let asked = Ends { source: [1; 16], source_port_be: port.to_be_bytes(), ..Ends::default() };
        Event { number, asked, time_ns, ..Event::zeroed() }
    }

    #[test]
    fn the_end_of_a_flow_finds_its_latest_beginning_once() {
        let mut begun = Begun::default();
        assert_eq!(begun.note(&event(EVENT_FLOW_ENDED, 1, 9)), None, "it began before");
        assert_eq!(begun.note(&event(COUNTER_FLOW_LOCAL, 1, 10)), None);
        begun.note(&event(COUNTER_FLOW_REMOTE, 2, 11));
        assert_eq!(begun.note(&event(EVENT_FLOW_ENDED, 1, 20)), Some(10));
        assert_eq!(begun.note(&event(EVENT_FLOW_ENDED, 1, 20)), None);
        assert_eq!(begun.note(&event(EVENT_FLOW_ENDED, 2, 20)), Some(11));
    }

    #[test]
    fn no_more_are_kept_than_there_is_room_for_and_the_newer_ones() {
        let mut begun = Begun::default();
        for n in 0..MOST as u64 {
            let mut flow = event(COUNTER_FLOW_LOCAL, n as u16, n);
            flow.asked.source[..8].copy_from_slice(&n.to_ne_bytes());
            begun.note(&flow);
        }
        begun.note(&event(COUNTER_FLOW_LOCAL, 7, u64::MAX));
        assert_eq!(begun.flows.len(), MOST / 2);
        assert_eq!(begun.note(&event(EVENT_FLOW_ENDED, 7, 0)), Some(u64::MAX));
    }
}
