//! Who lives when: the allocations of one run in order, and places for them in one block.
//!
//! The order of a step is known before it runs, so places are chosen offline: the largest buffers
//! first, each into the smallest gap that nothing alive at the same time uses. The same trace gives
//! the same layout on every machine.

use std::sync::Arc;

use super::memory::rounded;

/// What happened in a traced run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A buffer of this many bytes was taken; takes are counted from 0.
    Take(usize),
    /// The buffer of this take was given back.
    Give(usize),
    /// A segment of the tape whose inside is kept begins.
    Enter,
    /// It ends, with an output of this many bytes.
    Leave(usize),
}

/// The allocations of one run, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    events: Vec<Event>,
}

/// A buffer of a trace.
#[derive(Clone, Copy, Debug)]
struct Life {
    size: usize,
    /// Event that takes it.
    start: usize,
    /// Event that gives it back; `None` if it outlives the run.
    end: Option<usize>,
}

impl Trace {
    /// A trace of these events; gives of unknown or dead buffers are left out.
    pub fn from_events(events: impl IntoIterator<Item = Event>) -> Self {
        let mut alive = Vec::new();
        let mut trace = Self::default();
        for event in events {
            match event {
                Event::Take(_) => alive.push(true),
                Event::Give(index) => match alive.get_mut(index) {
                    Some(alive) if *alive => *alive = false,
                    _ => continue,
                },
                Event::Enter | Event::Leave(_) => {}
            }
            trace.push(event);
        }
        trace
    }

    pub(super) fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// What happened, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// How many buffers were taken.
    pub fn takes(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Take(_))).count()
    }

    fn lives(&self) -> Vec<Life> {
        let mut lives: Vec<Life> = Vec::new();
        for (at, event) in self.events.iter().enumerate() {
            match *event {
                Event::Take(bytes) => {
                    lives.push(Life { size: rounded(bytes), start: at, end: None });
                }
                Event::Give(index) => lives[index].end = Some(at),
                Event::Enter | Event::Leave(_) => {}
            }
        }
        lives
    }

    /// Most bytes alive at one time, of all that the run took.
    pub fn peak(&self) -> usize {
        self.peak_of(|_| true)
    }

    /// Most bytes alive at one time, of what the run gave back: no layout can be smaller.
    pub fn peak_within(&self) -> usize {
        self.peak_of(|life| life.end.is_some())
    }

    fn peak_of(&self, counted: impl Fn(&Life) -> bool) -> usize {
        let lives = self.lives();
        let (mut live, mut peak, mut taken) = (0, 0, 0);
        for event in &self.events {
            match *event {
                Event::Take(_) => {
                    live += if counted(&lives[taken]) { lives[taken].size } else { 0 };
                    peak = peak.max(live);
                    taken += 1;
                }
                Event::Give(index) if counted(&lives[index]) => live -= lives[index].size,
                _ => {}
            }
        }
        peak
    }

    /// Bytes that were taken and not given back.
    pub fn outliving(&self) -> usize {
        self.lives().iter().filter(|life| life.end.is_none()).map(|life| life.size).sum()
    }

    /// For each segment that the tape did not checkpoint, in order: bytes that it keeps for the
    /// backward pass, its output left out.
    pub fn segments(&self) -> Vec<usize> {
        let lives = self.lives();
        let (mut live, mut taken) = (0_usize, 0);
        let (mut kept, mut open): (Vec<usize>, Vec<(usize, usize)>) = (Vec::new(), Vec::new());
        for event in &self.events {
            match *event {
                Event::Take(_) => {
                    live += lives[taken].size;
                    taken += 1;
                }
                Event::Give(index) => live -= lives[index].size,
                Event::Enter => {
                    open.push((kept.len(), live));
                    kept.push(0);
                }
                Event::Leave(output) => {
                    if let Some((index, before)) = open.pop() {
                        kept[index] = live.saturating_sub(before + rounded(output));
                    }
                }
            }
        }
        kept
    }

    /// Places for all buffers that do not outlive the run.
    pub fn layout(&self) -> Layout {
        let lives = self.lives();
        let (places, total) = best_places(&lives, self.peak_within());
        let slots = lives.iter().zip(places).map(|(life, place)| Slot { size: life.size, place });
        Layout { slots: slots.collect(), total }
    }
}

/// Offsets of buffers (none for those that outlive the run) and the bytes they need.
type Places = (Vec<Option<usize>>, usize);

/// What comes first when buffers are placed: the largest.
type Rank<'a> = &'a dyn Fn(&Life) -> (usize, usize);

/// No order of placing is best for every run: several are tried until little is wasted over `least`.
fn best_places(lives: &[Life], least: usize) -> Places {
    let good = least + least / 100;
    let duration = |life: &Life| life.end.unwrap_or(life.start) - life.start;
    let ranks: [Rank; 3] =
        [&|life| (life.size, 0), &|life| (life.size * duration(life), life.size), &|life| {
            (duration(life), life.size)
        }];
    let mut best: Option<Places> = None;
    for rank in ranks {
        let mut order: Vec<usize> = (0..lives.len()).filter(|i| lives[*i].end.is_some()).collect();
        order.sort_by_key(|i| (std::cmp::Reverse(rank(&lives[*i])), lives[*i].start));
        let places = place(lives, &order);
        if best.as_ref().is_none_or(|best| places.1 < best.1) {
            best = Some(places);
        }
        if best.as_ref().is_some_and(|best| best.1 <= good) {
            break;
        }
    }
    best.unwrap_or_default()
}

/// Puts buffers, in this order, each into the smallest gap that it fits between those placed before
/// that live at the same time.
fn place(lives: &[Life], order: &[usize]) -> Places {
    let mut places = vec![None; lives.len()];
    // Sorted by offset: (offset, end of the place, start of life, end of life).
    let mut placed: Vec<(usize, usize, usize, usize)> = Vec::with_capacity(order.len());
    let mut total = 0;
    for index in order.iter().copied() {
        let Life { size, start, end: Some(end) } = lives[index] else { continue };
        let (mut cursor, mut best) = (0, None);
        for (offset, place_end, other_start, other_end) in placed.iter().copied() {
            if other_start >= end || start >= other_end {
                continue;
            }
            let gap = offset.saturating_sub(cursor);
            if gap >= size && best.is_none_or(|(smallest, _)| gap < smallest) {
                best = Some((gap, cursor));
            }
            cursor = cursor.max(place_end);
        }
        let offset = best.map_or(cursor, |(_, offset)| offset);
        places[index] = Some(offset);
        total = total.max(offset + size);
        let at = placed.partition_point(|other| other.0 <= offset);
        placed.insert(at, (offset, offset + size, start, end));
    }
    (places, total)
}

/// Where a buffer of a run goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) size: usize,
    /// Offset in the arena; `None` for one that outlives the run and comes from the pool.
    pub(super) place: Option<usize>,
}

/// Places in one block for the buffers of a run, in the order in which it takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) slots: Arc<[Slot]>,
    total: usize,
}

impl Layout {
    /// Bytes of the block.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Offset and bytes of each buffer; no offset for those that outlive the run.
    pub fn places(&self) -> impl Iterator<Item = (Option<usize>, usize)> + '_ {
        self.slots.iter().map(|slot| (slot.place, slot.size))
    }
}
