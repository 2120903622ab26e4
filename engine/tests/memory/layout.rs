//! Layouts of random traces: nothing that lives at the same time overlaps, little is wasted.

use engine::cuda::{Event, Layout, Trace};

use crate::Random;

/// Buffers come and go as they like.
fn random_trace(seed: u64, count: usize) -> Trace {
    let mut random = Random(seed);
    let (mut events, mut alive, mut taken) = (Vec::new(), Vec::new(), 0);
    while taken < count {
        if alive.len() > 24 || (!alive.is_empty() && random.below(2) == 0) {
            events.push(Event::Give(alive.swap_remove(random.below(alive.len()))));
        } else {
            let bits = 4 + random.below(16);
            let size = 1 + random.below(1 << bits);
            events.push(Event::Take(size));
            alive.push(taken);
            taken += 1;
        }
    }
    // A few outlive the run.
    events.extend(alive.into_iter().skip(3).map(Event::Give));
    Trace::from_events(events)
}

/// As a network trains: layers keep some buffers and use others for a while, then give them back
/// from the last layer to the first.
fn network_trace(seed: u64, layers: usize) -> Trace {
    let mut random = Random(seed);
    let (mut events, mut taken) = (Vec::new(), 0);
    let mut take = |events: &mut Vec<Event>, size: usize| {
        events.push(Event::Take(size));
        taken += 1;
        taken - 1
    };
    let mut kept = Vec::new();
    for _ in 0..layers {
        let unit = (1 + random.below(40)) << 12;
        let scratch = take(&mut events, unit * (1 + random.below(4)));
        let saved: Vec<usize> = (0..1 + random.below(5))
            .map(|_| take(&mut events, unit * (1 + random.below(3))))
            .collect();
        events.push(Event::Give(scratch));
        kept.push((unit, saved));
    }
    let mut gradient = None;
    for (unit, saved) in kept.into_iter().rev() {
        let scratch = take(&mut events, unit * (1 + random.below(4)));
        let next = take(&mut events, unit);
        events.extend(gradient.replace(next).map(Event::Give));
        events.push(Event::Give(scratch));
        events.extend(saved.into_iter().map(Event::Give));
    }
    events.extend(gradient.map(Event::Give));
    Trace::from_events(events)
}

/// Walks the trace and keeps what lives in a list.
fn assert_nothing_overlaps(trace: &Trace, layout: &Layout) {
    let places: Vec<(Option<usize>, usize)> = layout.places().collect();
    assert_eq!(places.len(), trace.takes());
    let (mut alive, mut taken): (Vec<(usize, usize, usize)>, usize) = (Vec::new(), 0);
    for event in trace.events() {
        match *event {
            Event::Take(bytes) => {
                let (place, size) = places[taken];
                assert!(size >= bytes && size % 256 == 0, "{size} for {bytes}");
                if let Some(start) = place {
                    assert!(start % 256 == 0 && start + size <= layout.total());
                    for (other, other_end, index) in &alive {
                        assert!(
                            start >= *other_end || start + size <= *other,
                            "{taken} on {index}"
                        );
                    }
                    alive.push((start, start + size, taken));
                }
                taken += 1;
            }
            Event::Give(index) => {
                assert!(places[index].0.is_some(), "{index} ends and has no place");
                alive.retain(|(_, _, other)| *other != index);
            }
            Event::Enter | Event::Leave(_) => {}
        }
    }
    assert!(alive.is_empty(), "what outlives the run has no place in the arena");
}

#[test]
fn no_two_live_buffers_overlap_and_little_is_wasted() {
    let (mut worst, mut sum) = (0_f64, 0.);
    for seed in 1..60 {
        for trace in [random_trace(seed, 300), network_trace(seed, 60)] {
            let layout = trace.layout();
            assert_nothing_overlaps(&trace, &layout);
            assert!(layout.total() >= trace.peak_within());
            let share = layout.total() as f64 / trace.peak_within() as f64;
            (worst, sum) = (worst.max(share), sum + share);
            assert_eq!(layout, trace.layout(), "the same trace has the same layout");
        }
    }
    // Few buffers of sizes over five orders, in no order at all, are the hardest.
    assert!(worst < 1.2 && sum / 118. < 1.03, "worst {worst}, mean {}", sum / 118.);
}

#[test]
fn networks_are_laid_out_almost_without_waste() {
    let mut sum = 0.;
    for seed in 1..40 {
        let trace = network_trace(seed, 120);
        let share = trace.layout().total() as f64 / trace.peak_within() as f64;
        assert!(share < 1.03, "seed {seed}: {share}");
        sum += share;
    }
    assert!(sum / 39. < 1.01, "{}", sum / 39.);
}

#[test]
fn a_chain_takes_two_places() {
    let events = (0..10).flat_map(|i| {
        let give = (i > 0).then(|| Event::Give(i - 1));
        [Some(Event::Take(1000)), give].into_iter().flatten()
    });
    let trace = Trace::from_events(events.chain([Event::Give(9)]));
    assert_eq!((trace.peak(), trace.layout().total()), (2048, 2048));
    assert_eq!(trace.outliving(), 0);
}

#[test]
fn what_outlives_the_run_is_counted_apart() {
    let trace = Trace::from_events([
        Event::Take(256),
        Event::Take(512),
        Event::Give(0),
        Event::Give(0),
        Event::Give(7),
    ]);
    assert_eq!((trace.peak(), trace.peak_within(), trace.outliving()), (768, 256, 512));
    let places: Vec<_> = trace.layout().places().collect();
    assert_eq!(places, [(Some(0), 256), (None, 512)]);
}

#[test]
fn segments_tell_what_they_keep() {
    let trace = Trace::from_events([
        Event::Enter,
        Event::Take(256),
        Event::Take(1024),
        Event::Take(512),
        Event::Give(0),
        Event::Leave(512),
        Event::Enter,
        Event::Take(100),
        Event::Leave(100),
    ]);
    assert_eq!(trace.segments(), [1024, 0]);
}
