//! The sum of a vector over hosts, in segments, sending and receiving at once.
//!
//! A segment is cut into one part per host. Each host sends every other one that one's part, adds up
//! its own part in the order of the hosts, and sends the total to all. What travels on one
//! connection is a header and then, without further marks, part 0, part 1, ... and, [`DEPTH`] segments
//! behind them, total 0, total 1, ...: both sides know every length. So the line is never idle for the
//! turn-around of a message, parts are sent from and totals received into the caller's memory, and
//! only foreign parts need a place of their own.
//!
//! Nothing can wait in a circle: a part waits for nothing but its host, total `k` for the parts `k` and
//! those up to `k + DEPTH` before it on the line, and a host that has no place for part `k` has not got
//! all parts before `k - SLOTS`. So a host may wait for a total only when it has [`Sum::lead`] floats
//! more ready than that, or all.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

use super::wire::{Broken, HEADER, Label};
use crate::shm::shard;
use crate::sums::{BLOCK, Order, Sums, add_two};

/// Totals travel so many segments behind the parts: what may be on its way for the line to be full.
const DEPTH: usize = 8;
/// Parts that a host keeps of each other one until all hosts' are there.
const SLOTS: usize = DEPTH + 2;
/// Floats of a part: at most, and at least where the vector is short.
const PART: (usize, usize) = (64 * 1024, 4 * 1024);
/// Into so many segments even a short vector is cut.
const CUTS: usize = 4;
/// Bytes moved to or from one host before the others have their turn.
const BURST: usize = 1 << 20;

/// How a vector is cut; the same on all hosts.
#[derive(Clone, Copy, Debug)]
struct Plan {
    length: usize,
    /// Floats of a segment; the last may be shorter.
    segment: usize,
    hosts: usize,
    host: usize,
}

impl Plan {
    fn segments(&self) -> usize {
        self.length.div_ceil(self.segment)
    }

    /// The part of `host` in a segment.
    fn part(&self, segment: usize, host: usize) -> Range<usize> {
        let start = segment * self.segment;
        let part = shard(self.segment.min(self.length - start), host, self.hosts);
        start + part.start..start + part.end
    }

    /// `segments`, and those after it in which `host` has nothing: the last one may be that short.
    fn past_empty(&self, mut segments: usize, host: usize) -> usize {
        while segments < self.segments() && self.part(segments, host).is_empty() {
            segments += 1;
        }
        segments
    }

    /// Bytes that go to another host, and as many come from it.
    fn bytes_with(&self, host: usize) -> u64 {
        let parts = (0..self.segments())
            .map(|segment| self.part(segment, host).len() + self.part(segment, self.host).len());
        (parts.sum::<usize>() * size_of::<f32>()) as u64
    }

    fn steps(&self) -> usize {
        match self.segments() {
            0 => 0,
            segments => 2 * (segments + DEPTH),
        }
    }

    /// What is moved in a step of a connection; nothing in some at the ends.
    fn item(&self, step: usize) -> Option<Item> {
        let turn = step / 2;
        match step % 2 {
            0 => (turn < self.segments()).then_some(Item::Part(turn)),
            _ => turn.checked_sub(DEPTH).map(Item::Total),
        }
    }
}

/// What goes over a connection.
#[derive(Clone, Copy, Debug)]
enum Item {
    /// What the receiver adds up.
    Part(usize),
    /// What the sender has added up.
    Total(usize),
}

/// How far one direction of a connection is.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Bytes of the header.
    head: usize,
    step: usize,
    /// Bytes of the step's item.
    bytes: usize,
}

impl Cursor {
    /// Leaves out what has no item, or an empty one; the item to move and its bytes.
    fn next(&mut self, plan: &Plan, bytes: impl Fn(Item) -> usize) -> Option<Item> {
        while self.step < plan.steps() {
            match plan.item(self.step).filter(|item| self.bytes < bytes(*item)) {
                Some(item) => return Some(item),
                None => (self.step, self.bytes) = (self.step + 1, 0),
            }
        }
        None
    }
}

/// The connection to one host.
#[derive(Debug)]
pub(super) struct Lane {
    head_out: [u8; HEADER],
    head_in: [u8; HEADER],
    out: Cursor,
    into: Cursor,
    /// Parts received.
    parts: usize,
    /// Totals received.
    totals: usize,
    /// Places for parts: `SLOTS` of them, used in turn.
    slots: Vec<f32>,
    slot: usize,
}

/// A sum under way.
#[derive(Debug)]
pub(crate) struct Sum {
    plan: Plan,
    sums: Sums,
    label: Label,
    /// Floats from the start that may be sent: this host's ranks have added them up.
    pub ready: usize,
    /// Segments of which the own part is added up over all hosts.
    summed: usize,
    lanes: Vec<Lane>,
}

impl Sum {
    /// Of `length` floats, between `host` and the others of `hosts`. `slots` is memory to use again.
    pub(super) fn new(
        length: usize,
        (host, hosts): (usize, usize),
        order: Order,
        label: Label,
        slots: &mut Vec<Vec<f32>>,
    ) -> Sum {
        let part = length.div_ceil(hosts * CUTS).clamp(PART.1, PART.0);
        let plan = Plan { length, segment: part * hosts, hosts, host };
        let slot = (0..hosts).map(|one| shard(plan.segment, one, hosts).len()).max().unwrap_or(0);
        slots.resize(hosts, Vec::new());
        let lanes = slots.iter_mut().enumerate().map(|(peer, slots)| {
            let mut slots = std::mem::take(slots);
            if peer != host {
                slots.resize(slot * SLOTS.min(plan.segments()), 0.0);
            }
            let head_out = label.to_bytes(plan.bytes_with(peer));
            let (out, into) = Default::default();
            Lane { head_out, head_in: [0; HEADER], out, into, parts: 0, totals: 0, slots, slot }
        });
        Sum { plan, sums: Sums::new(order), label, ready: 0, summed: 0, lanes: lanes.collect() }
    }

    /// So many floats have to be ready beyond those whose totals are waited for.
    pub fn lead(&self) -> usize {
        (DEPTH + 1) * self.plan.segment
    }

    /// Gives the memory back.
    pub(super) fn into_slots(self) -> Vec<Vec<f32>> {
        self.lanes.into_iter().map(|lane| lane.slots).collect()
    }

    /// Floats from the start that are summed over all hosts here.
    pub(super) fn done(&self) -> usize {
        let plan = &self.plan;
        let totals = self.others().map(|host| plan.past_empty(self.lanes[host].totals, host)).min();
        (totals.unwrap_or(self.summed).min(self.summed) * plan.segment).min(plan.length)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.plan.host;
        (0..self.plan.hosts).filter(move |host| *host != own)
    }

    /// Whether nothing is left to send to or to receive from `host`.
    pub(super) fn is_done_with(&mut self, host: usize) -> bool {
        self.is_sent(host) && self.is_received(host)
    }

    fn is_sent(&mut self, host: usize) -> bool {
        let (plan, lane) = (self.plan, &mut self.lanes[host]);
        lane.out.head == HEADER
            && lane.out.next(&plan, |item| bytes_out(&plan, host, item)).is_none()
    }

    pub(super) fn is_received(&mut self, host: usize) -> bool {
        let (plan, lane) = (self.plan, &mut self.lanes[host]);
        lane.into.head == HEADER
            && lane.into.next(&plan, |item| bytes_in(&plan, host, item)).is_none()
    }

    /// Whether something can be sent to (`out`) or has to be received from `host` now.
    pub(super) fn wants(&mut self, host: usize, out: bool) -> bool {
        let (plan, ready, summed) = (self.plan, self.ready, self.summed);
        let lane = &mut self.lanes[host];
        if out {
            let head = lane.out.head < HEADER;
            let next = lane.out.next(&plan, |item| bytes_out(&plan, host, item));
            head || next.is_some_and(|item| is_ready(&plan, item, ready, summed))
        } else {
            let head = lane.into.head < HEADER;
            let next = lane.into.next(&plan, |item| bytes_in(&plan, host, item));
            head || next.is_some_and(|item| has_place(item, summed))
        }
    }

    /// Moves what the connection to `host` takes and gives without waiting; true when anything moved.
    pub(super) fn step(
        &mut self,
        host: usize,
        stream: &mut TcpStream,
        values: &mut [f32],
    ) -> Result<bool, Broken> {
        let sent = self.send(host, stream, values).map_err(Broken::Lost)?;
        Ok(self.receive(host, stream, values)? || sent)
    }

    fn send(&mut self, host: usize, stream: &mut TcpStream, values: &[f32]) -> io::Result<bool> {
        let (plan, ready, summed) = (self.plan, self.ready, self.summed);
        let lane = &mut self.lanes[host];
        let mut moved = 0;
        while moved < BURST {
            let part = if lane.out.head < HEADER {
                &lane.head_out[lane.out.head..]
            } else {
                let next = lane.out.next(&plan, |item| bytes_out(&plan, host, item));
                let Some(item) = next.filter(|item| is_ready(&plan, *item, ready, summed)) else {
                    break;
                };
                let range = match item {
                    Item::Part(segment) => plan.part(segment, host),
                    Item::Total(segment) => plan.part(segment, plan.host),
                };
                &bytemuck::cast_slice(&values[range])[lane.out.bytes..]
            };
            let (count, wanted) = match stream.write(part) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => (count, part.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            moved += count;
            match lane.out.head < HEADER {
                true => lane.out.head += count,
                false => lane.out.bytes += count,
            }
            if count < wanted {
                break;
            }
        }
        Ok(moved > 0)
    }

    fn receive(
        &mut self,
        host: usize,
        stream: &mut TcpStream,
        values: &mut [f32],
    ) -> Result<bool, Broken> {
        let (plan, summed) = (self.plan, self.summed);
        let lane = &mut self.lanes[host];
        let mut moved = 0;
        while moved < BURST {
            let next = lane.into.next(&plan, |item| bytes_in(&plan, host, item));
            let (into, item) = if lane.into.head < HEADER {
                (&mut lane.head_in[lane.into.head..], None)
            } else {
                let Some(item) = next.filter(|item| has_place(*item, summed)) else { break };
                let floats = match item {
                    Item::Part(segment) => {
                        let start = segment % SLOTS * lane.slot;
                        &mut lane.slots[start..start + plan.part(segment, plan.host).len()]
                    }
                    Item::Total(segment) => &mut values[plan.part(segment, host)],
                };
                (&mut bytemuck::cast_slice_mut(floats)[lane.into.bytes..], Some(item))
            };
            let wanted = into.len();
            let count = match stream.read(into) {
                Ok(0) => return Err(Broken::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Broken::Lost(error)),
            };
            moved += count;
            lane.note_received(count, wanted, item, &self.label, plan.bytes_with(host))?;
            if count < wanted {
                break;
            }
        }
        Ok(moved > 0)
    }

    /// Adds up the own parts that have come from all hosts; true when there was one.
    pub(super) fn add_up(&mut self, values: &mut [f32]) -> bool {
        let (plan, first) = (self.plan, self.summed);
        let parts = self.others().map(|host| self.lanes[host].parts).min().unwrap_or(0);
        let come = plan.past_empty(parts, plan.host);
        while self.summed < come && plan.length.min((self.summed + 1) * plan.segment) <= self.ready
        {
            let own = plan.part(self.summed, plan.host);
            let slot = self.summed % SLOTS;
            if plan.hosts == 2 {
                let lane = &self.lanes[1 - plan.host];
                let other = &lane.slots[slot * lane.slot..][..own.len()];
                add_two(&mut values[own], other);
                self.summed += 1;
                continue;
            }
            for start in own.clone().step_by(BLOCK) {
                let end = own.end.min(start + BLOCK);
                for (host, lane) in self.lanes.iter().enumerate() {
                    let at = slot * lane.slot + start - own.start;
                    match host == plan.host {
                        true => self.sums.add(host, &values[start..end]),
                        false => self.sums.add(host, &lane.slots[at..at + end - start]),
                    }
                }
                values[start..end].copy_from_slice(&self.sums.finish()[..end - start]);
            }
            self.summed += 1;
        }
        self.summed > first
    }
}

impl Lane {
    /// Counts bytes that have come, and looks at the header once it is whole.
    fn note_received(
        &mut self,
        count: usize,
        wanted: usize,
        item: Option<Item>,
        label: &Label,
        bytes: u64,
    ) -> Result<(), Broken> {
        let Some(item) = item else {
            self.into.head += count;
            if self.into.head == HEADER {
                let (theirs, payload) = Label::from_bytes(&self.head_in).ok_or(Broken::Foreign)?;
                if theirs != *label {
                    return Err(Broken::Other(theirs));
                }
                if payload != bytes {
                    return Err(Broken::Foreign);
                }
            }
            return Ok(());
        };
        self.into.bytes += count;
        match item {
            Item::Part(segment) if count == wanted => self.parts = segment + 1,
            Item::Total(segment) if count == wanted => self.totals = segment + 1,
            _ => (),
        }
        Ok(())
    }
}

fn bytes_out(plan: &Plan, host: usize, item: Item) -> usize {
    let part = match item {
        Item::Part(segment) => plan.part(segment, host),
        Item::Total(segment) => plan.part(segment, plan.host),
    };
    part.len() * size_of::<f32>()
}

fn bytes_in(plan: &Plan, host: usize, item: Item) -> usize {
    let part = match item {
        Item::Part(segment) => plan.part(segment, plan.host),
        Item::Total(segment) => plan.part(segment, host),
    };
    part.len() * size_of::<f32>()
}

/// Whether an item can be sent.
fn is_ready(plan: &Plan, item: Item, ready: usize, summed: usize) -> bool {
    match item {
        Item::Part(segment) => plan.length.min((segment + 1) * plan.segment) <= ready,
        Item::Total(segment) => segment < summed,
    }
}

/// Whether an item can be received.
fn has_place(item: Item, summed: usize) -> bool {
    match item {
        Item::Part(segment) => segment < summed + SLOTS,
        Item::Total(_) => true,
    }
}
