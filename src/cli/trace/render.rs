//! A trace as text: a block for each program that ran.

use super::Trace;
use super::connect::Connected;
use super::journey::{Passage, Step};
use crate::cli::monitor::compact;

pub fn text(trace: &Trace) -> String {
    let mut text = String::new();
    let mut number = 0;
    passage(&mut text, &format!("request, by {}", trace.device), &trace.request, &mut number);
    if let Some(answer) = &trace.answer {
        passage(&mut text, "answer", answer, &mut number);
    }
    for note in &trace.notes {
        line(&mut text, &format!("note: {note}"));
    }
    text
}

fn passage(text: &mut String, head: &str, passage: &Passage, number: &mut u32) {
    line(text, head);
    for step in &passage.steps {
        *number += 1;
        self::step(text, *number, step);
    }
    line(text, &format!("   {}", passage.end));
}

fn step(text: &mut String, number: u32, step: &Step) {
    line(text, &format!("{number}. {}, {}: {}", step.device, step.direction, step.program));
    let mut add = |head: &str, words: &str| line(text, &format!("   {head:<9} {words}"));
    add("packet", &step.packet.words());
    for row in &step.rows {
        add(row.what, &format!("{}: {}", row.map, row.text));
    }
    for event in &step.events {
        // Without the time, which is now.
        let words = compact(event);
        add("event", words.split_once(' ').map_or(words.as_str(), |(_, words)| words));
    }
    if !step.counted.is_empty() {
        add("counted", &step.counted.join(", "));
    }
    add("verdict", &format!("{}, {} ns", step.verdict, step.nanoseconds));
    if let Some(after) = &step.becomes {
        add("becomes", &after.words());
    }
}

pub fn connected(connected: &Connected) -> String {
    let mut text = String::new();
    line(&mut text, &format!("connect() to {}, in {}", connected.to, connected.cgroup.display()));
    let mut add = |head: &str, words: &str| line(&mut text, &format!("   {head:<9} {words}"));
    for event in &connected.events {
        let words = compact(event);
        add("event", words.split_once(' ').map_or(words.as_str(), |(_, words)| words));
    }
    if connected.events.is_empty() {
        add("event", "none: it is no Service's, or it is left to packets (kubelane explain says which)");
    }
    let answer = match &connected.error {
        None => "success".to_owned(),
        Some(_) if connected.is_unreachable => {
            "let go on (this namespace has no route, so that nothing is sent)".to_owned()
        }
        Some(error) => error.clone(),
    };
    add("verdict", &format!("{answer}, {} ns", connected.nanoseconds));
    text
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
