//! Attention and its gradients, for every kind of kernel that a card has for it.

use super::{Check, for_types, random_on_both, relative_error, worst_error};
use crate::backend::{AttentionKind, AttentionOut, AttentionSaved};
use crate::{DType, Device, Result, Tensor};

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    dim: usize,
    causal: bool,
    /// Factor of the usual scale: above 1, few keys take it all.
    sharpness: f32,
    /// Elements of the operands before what is looked at.
    offset: usize,
}

impl Case {
    fn new([batch, heads, queries, keys, dim]: [usize; 5]) -> Self {
        let (causal, sharpness, offset) = (false, 1., 0);
        Self { batch, heads, queries, keys, dim, causal, sharpness, offset }
    }

    fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    fn name(&self, op: &str) -> String {
        let Self { batch, heads, queries, keys, dim, .. } = self;
        let mut name = format!("attention {op} [{batch},{queries},{heads}*{dim}] keys {keys}");
        name += if self.causal { " causal" } else { "" };
        name += if self.sharpness != 1. { " sharp" } else { "" };
        name + if self.offset != 0 { " unaligned" } else { "" }
    }

    fn kind(&self) -> AttentionKind {
        let scale = self.sharpness / (self.dim as f32).sqrt();
        AttentionKind { heads: self.heads, scale, causal: self.causal }
    }

    /// Tokens on the device and on the CPU.
    fn tokens(
        &self,
        (device, dtype): (Device, DType),
        count: usize,
        seed: u32,
    ) -> Result<[Tensor; 2]> {
        let shape = [self.batch, count, self.heads * self.dim];
        let len = self.offset + shape.iter().product::<usize>();
        let (there, here) = random_on_both(device, &[len], seed, dtype)?;
        Ok([there.view(self.offset, &shape)?, here.view(self.offset, &shape)?])
    }

    /// `q`, `k` and `v` on both.
    fn inputs(&self, on: (Device, DType)) -> Result<[[Tensor; 2]; 3]> {
        let (queries, keys) = (self.queries, self.keys);
        Ok([self.tokens(on, queries, 1)?, self.tokens(on, keys, 2)?, self.tokens(on, keys, 3)?])
    }

    fn forward_error(&self, device: Device, dtype: DType) -> Result<f32> {
        let [q, k, v] = self.inputs((device, dtype))?;
        let run = |i: usize| run_forward([&q[i], &k[i], &v[i]], self.kind());
        let (got, want) = (run(0)?, run(1)?);
        worst_error([(&got.out, &want.out), (&got.lse, &want.lse)])
    }

    fn backward_error(&self, device: Device, dtype: DType) -> Result<f32> {
        let [q, k, v] = self.inputs((device, dtype))?;
        let dy = self.tokens((device, dtype), self.queries, 4)?;
        let run = |i: usize| {
            let AttentionOut { out, lse } = run_forward([&q[i], &k[i], &v[i]], self.kind())?;
            let saved = AttentionSaved { q: &q[i], k: &k[i], v: &v[i], out: &out, lse: &lse };
            let backend = dy[i].device().backend();
            backend.attention_backward(&dy[i], &saved, self.kind())
        };
        let (got, want) = (run(0)?, run(1)?);
        // A single key has a probability of 1 whatever it is: what is left is rounding.
        if self.keys == 1 {
            return relative_error(&got.2, &want.2);
        }
        worst_error([(&got.0, &want.0), (&got.1, &want.1), (&got.2, &want.2)])
    }

    fn checks(self) -> Vec<Check> {
        let forward = move |device, dtype| self.forward_error(device, dtype);
        let backward = move |device, dtype| self.backward_error(device, dtype);
        let mut checks = for_types(&self.name("forward"), 1., forward);
        // Probabilities and their gradients are rounded on the way to three results.
        checks.extend(for_types(&self.name("backward"), 1., backward));
        checks
    }
}

fn run_forward([q, k, v]: [&Tensor; 3], kind: AttentionKind) -> Result<AttentionOut> {
    q.device().backend().attention(q, k, v, kind)
}

/// All of them.
pub fn checks() -> Vec<Check> {
    let small = [
        // Head sizes without a kernel for tensor cores.
        Case::new([2, 3, 5, 1, 4]),
        Case::new([1, 2, 37, 70, 8]),
        Case::new([1, 1, 33, 33, 16]).causal(),
        Case::new([3, 1, 34, 40, 100]),
        Case::new([1, 2, 3, 35, 200]),
        Case::new([1, 1, 33, 40, 512]),
        // Wide and narrow kernels, one tile and several, queries split over blocks or not.
        Case::new([3, 2, 70, 77, 40]),
        Case::new([1, 1, 150, 77, 40]),
        Case::new([1, 2, 40, 231, 40]),
        Case::new([2, 2, 9, 1, 40]),
        Case::new([4, 1, 130, 130, 40]).causal(),
        Case::new([1, 1, 77, 77, 64]).causal(),
        Case::new([2, 2, 77, 77, 64]).causal(),
        Case::new([1, 1, 100, 231, 80]),
        Case::new([2, 2, 140, 77, 80]),
        Case::new([1, 1, 70, 77, 160]),
        Case::new([1, 1, 70, 70, 160]).causal(),
        Case { sharpness: 4., ..Case::new([1, 2, 70, 140, 64]) },
        Case { offset: 4, ..Case::new([1, 1, 40, 33, 40]) },
    ];
    let big = [
        Case::new([2, 8, 4096, 4096, 40]),
        Case::new([2, 8, 4096, 77, 40]),
        Case::new([1, 8, 4000, 231, 40]),
        Case::new([8, 8, 1024, 1024, 80]),
        Case::new([1, 8, 1000, 77, 80]),
        Case::new([1, 8, 256, 256, 160]),
        Case::new([8, 8, 64, 77, 160]),
        Case::new([2, 10, 2304, 2304, 64]),
        Case::new([8, 12, 77, 77, 64]).causal(),
        Case::new([1, 1, 4096, 4096, 512]),
    ];
    let small = small.into_iter().flat_map(Case::checks);
    small.chain(big.into_iter().flat_map(Case::checks).map(Check::big)).collect()
}
