//! Memory of cards on the recording driver: traces, layouts, arenas, the limit.

mod arena;
mod layout;
mod pool;

use engine::Device;
use engine::cuda::Card;
use engine::cuda::driver::{CardFacts, WORKSPACE};
use engine::cuda::recorder;

/// A recording card of which tensors may use `limit` bytes.
fn card(limit: usize) -> (Device, &'static Card) {
    let facts = CardFacts {
        name: "recorder".into(),
        label: "recorder".into(),
        capability: (8, 6),
        processors: 28,
        memory: 1 << 33,
        shared_memory: 100 << 10,
        computes: true,
    };
    let device = recorder::open(facts, limit + WORKSPACE).expect("it opens");
    (device, device.card().expect("it is a card"))
}

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}
