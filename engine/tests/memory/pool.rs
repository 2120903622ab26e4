//! What the driver's units cost: hundreds of weights share segments, and segments go back whole.

use engine::{DType, Tensor};

use crate::card;

#[test]
fn weights_take_hardly_more_than_their_bytes() {
    let (device, card) = card(8 << 30);
    // As in a U-Net: many of a few megabytes, none a multiple of the driver's unit.
    let weight = |i: usize| {
        let len = 300_000 + i * 7919 % 1_500_000;
        Tensor::zeros(device, &[len], DType::BF16).unwrap()
    };
    let weights: Vec<Tensor> = (0..400).map(weight).collect();
    let stats = card.memory_stats();
    assert!(stats.reserved as f64 <= stats.live as f64 * 1.04, "{stats:?}");
    drop(weights);
    card.release_idle();
    assert_eq!((card.memory_stats().reserved, card.memory_stats().live), (0, 0));
}

#[test]
fn a_big_block_is_made_of_what_small_ones_left() {
    let (device, card) = card(64 << 20);
    let small: Vec<Tensor> =
        (0..7).map(|_| Tensor::zeros(device, &[2 << 20], DType::F32).unwrap()).collect();
    drop(small);
    // No segment of the small ones is that large; they go back to the driver for it.
    assert!(Tensor::zeros(device, &[15 << 20], DType::F32).is_ok());
    assert!(card.memory_stats().reserved <= 64 << 20);
}
