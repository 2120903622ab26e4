//! Runs in an arena: the same addresses each time, the limit held, other runs refused unharmed.

use engine::cuda::{Arena, Trace};
use engine::{DType, Device, EngineError, Result, Tensor};

use crate::card;

fn tensor(device: Device, len: usize) -> Result<Tensor> {
    Tensor::zeros(device, &[len], DType::F32)
}

/// A run that takes, keeps and gives: one result of `len` numbers.
fn run(device: Device, len: usize) -> Result<Tensor> {
    let first = tensor(device, 1000)?;
    let kept = tensor(device, len)?;
    drop(first);
    let second = tensor(device, 500)?;
    drop((second, tensor(device, 700)?));
    Ok(kept)
}

fn traced(device: Device, len: usize) -> Trace {
    let (trace, kept) =
        device.card().expect("it is a card").trace(|| run(device, len)).expect("it runs");
    assert_eq!(kept.shape(), [len]);
    trace
}

#[test]
fn the_arena_counts_once_and_the_result_comes_from_the_pool() {
    let (device, card) = card(1 << 20);
    let trace = traced(device, 64);
    // 700 and 500 numbers live together.
    assert_eq!((trace.takes(), trace.outliving()), (4, 256));
    let layout = trace.layout();
    assert_eq!(layout.total(), trace.peak_within());
    card.release_idle();
    assert_eq!(card.memory_stats().reserved, 0);
    let arena = Arena::new(card, layout.total()).unwrap();
    let before = card.memory_stats();
    assert_eq!((before.live, before.reserved), (arena.bytes(), arena.bytes()));
    for _ in 0..3 {
        let kept = card.within(&arena, &layout, || run(device, 64)).unwrap();
        assert_eq!(card.memory_stats().live, arena.bytes() + 256);
        drop(kept);
    }
    assert_eq!(card.memory_stats().reserved, arena.bytes() + 256);
    drop(arena);
    card.release_idle();
    assert_eq!(card.memory_stats().reserved, 0);
}

#[test]
fn another_size_is_refused_and_the_pool_still_works() {
    let (device, card) = card(1 << 20);
    let layout = traced(device, 64).layout();
    let arena = Arena::new(card, layout.total()).unwrap();
    let error = card.within(&arena, &layout, || run(device, 640)).unwrap_err();
    assert!(matches!(error, EngineError::PlanMismatch(_)), "{error}");
    assert!(error.to_string().contains("takes 2560 bytes, traced were 256"), "{error}");
    // Neither the arena nor the pool is hurt.
    assert_eq!(run(device, 640).unwrap().shape(), [640]);
    assert!(card.within(&arena, &layout, || run(device, 64)).is_ok());
}

#[test]
fn fewer_and_more_buffers_are_refused() {
    let (device, card) = card(1 << 20);
    let layout = traced(device, 64).layout();
    let arena = Arena::new(card, layout.total()).unwrap();
    let fewer = card.within(&arena, &layout, || tensor(device, 1000).map(drop)).unwrap_err();
    assert!(fewer.to_string().contains("1 buffers were taken, 4 were traced"), "{fewer}");
    let more = card.within(&arena, &layout, || {
        drop(run(device, 64)?);
        tensor(device, 1)
    });
    let more = more.unwrap_err();
    assert!(more.to_string().contains("more than the traced 4"), "{more}");
}

#[test]
fn a_buffer_that_lives_longer_than_traced_is_never_overwritten() {
    let (device, card) = card(1 << 20);
    let (trace, ()) = card
        .trace(|| {
            drop(tensor(device, 1000)?);
            drop(tensor(device, 1000)?);
            Ok(())
        })
        .unwrap();
    let layout = trace.layout();
    let arena = Arena::new(card, layout.total()).unwrap();
    let mut stray = None;
    let error = card
        .within(&arena, &layout, || {
            stray = Some(tensor(device, 1000)?);
            tensor(device, 1000).map(drop)
        })
        .unwrap_err();
    assert!(error.to_string().contains("still in use"), "{error}");
    // It blocks the arena for as long as it lives, even beyond the arena's own life.
    let fine = || {
        drop(tensor(device, 1000)?);
        drop(tensor(device, 1000)?);
        Ok(())
    };
    assert!(card.within(&arena, &layout, fine).is_err());
    drop(stray.take());
    assert!(card.within(&arena, &layout, fine).is_ok());
    let left = card.within(&arena, &layout, || {
        drop(tensor(device, 1000)?);
        stray = Some(tensor(device, 1000)?);
        Ok(())
    });
    assert!(left.unwrap_err().to_string().contains("1 buffers outlive the run"));
    drop(arena);
    assert!(card.memory_stats().live > 0, "memory of a live buffer was freed");
    drop(stray);
    assert_eq!(card.memory_stats().live, 0);
}

#[test]
fn nested_runs_are_refused_and_end_cleanly() {
    let (device, card) = card(1 << 20);
    let nested = card.trace(|| card.trace(|| tensor(device, 1)).map(drop));
    assert!(nested.unwrap_err().to_string().contains("cannot hold another"));
    let panics = || card.trace(|| -> Result<()> { panic!("on purpose") }).map(drop);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
    assert_eq!(card.trace(|| tensor(device, 1)).unwrap().0.takes(), 1);
}

#[test]
fn other_threads_allocate_meanwhile() {
    let (device, card) = card(1 << 20);
    let on_another_thread = || std::thread::spawn(move || tensor(device, 99)).join().unwrap();
    let (trace, _) = card
        .trace(|| {
            let kept = run(device, 64)?;
            on_another_thread()?;
            Ok(kept)
        })
        .unwrap();
    assert_eq!(trace.takes(), 4);
    let layout = trace.layout();
    let arena = Arena::new(card, layout.total()).unwrap();
    let outside = card
        .within(&arena, &layout, || {
            let outside = on_another_thread()?;
            drop(run(device, 64)?);
            Ok(outside)
        })
        .unwrap();
    assert_eq!(outside.len(), 99);
}

#[test]
fn the_limit_holds_for_arena_and_pool_together() {
    let (device, card) = card(64 << 10);
    let arena = Arena::new(card, 48 << 10).unwrap();
    assert!(tensor(device, 4 << 10).is_ok());
    let error = tensor(device, 5 << 10).unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory { limit: 65536, .. }), "{error}");
    assert!(Arena::new(card, 32 << 10).is_err());
    drop(arena);
    assert!(tensor(device, 15 << 10).is_ok());
}

#[test]
fn an_arena_that_is_too_small_is_refused() {
    let (device, card) = card(1 << 20);
    let layout = traced(device, 64).layout();
    let arena = Arena::new(card, layout.total() - 256).unwrap();
    assert!(card.within(&arena, &layout, || run(device, 64)).is_err());
}
