//! What is given up so that a run fits: as little as possible, in a fixed order.

use std::collections::BTreeSet;
use std::rc::Rc;

use anyhow::{Result, bail};
use engine::cuda::driver::{CardFacts, WORKSPACE};
use engine::{Checkpointing, DType};

use super::measure::{Recording, StepShape, Subject, VaeRecording};
use super::refuse::{refuse, refuse_encoding, refuse_too_little};
use super::rehearse::Rehearsal;
use super::{ARENA, CONTEXT_BYTES, CardPlan, Chosen, OVERHEAD, Row};
use crate::memory::show_bytes;
use crate::optimizer::Choice;

/// What the user asked for and what the planner may add.
pub struct Wishes<'a> {
    /// `gradient_checkpointing`: all blocks, whatever fits.
    pub checkpointing: bool,
    /// `fp8_base`.
    pub fp8: bool,
    /// The user's optimizer.
    pub optimizer: &'a Choice,
    /// The same with its state in 8 bits, where there is such a one.
    pub eight_bit: Option<&'a Choice>,
    /// Shapes of all batches.
    pub shapes: &'a [StepShape],
    /// `[batch,height,width]` of the images that the VAE encodes at most at a time, and whether that is
    /// over before the training.
    pub images: ([usize; 3], bool),
}

/// Sizes of a step of the largest shape as blocks are checkpointed.
pub(super) struct Steps<'r, 'a> {
    recording: &'r mut Recording<'a>,
    shapes: Vec<StepShape>,
    /// Blocks, those first that keep most for what it costs to compute them again.
    order: Vec<usize>,
    /// Bytes that each block keeps.
    kept: Vec<usize>,
    /// Operations of a step without checkpointing.
    plain: f64,
}

/// Bytes of a step: its arena, what outlives it, its inputs (twice: the next batch waits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StepBytes {
    arena: usize,
    inputs: usize,
}

impl StepBytes {
    pub fn total(self) -> usize {
        self.arena + self.inputs
    }
}

impl<'r, 'a> Steps<'r, 'a> {
    pub fn new(recording: &'r mut Recording<'a>, shapes: &[StepShape]) -> Result<Self> {
        let mut shapes = shapes.to_vec();
        shapes.sort_by_key(|shape| std::cmp::Reverse((shape.pixels(), shape.chunks, *shape)));
        shapes.dedup();
        let Some(largest) = shapes.first() else { bail!("there is no batch to plan for") };
        let kept = recording.step(*largest, &Checkpointing::None)?.0.segments();
        let plain = recording.flops(*largest, &Checkpointing::None)?;
        Ok(Self { recording, shapes, order: (0..kept.len()).collect(), kept, plain })
    }

    /// Blocks of a step.
    pub fn count(&self) -> usize {
        self.order.len()
    }

    /// Measures what it costs to compute each block again, and orders them by it.
    fn put_in_order(&mut self) -> Result<()> {
        let alone = |block: usize| Checkpointing::Chosen(Rc::new(BTreeSet::from([block])));
        let costs: Vec<f64> =
            (0..self.count()).map(|block| self.again(&alone(block))).collect::<Result<_>>()?;
        let worth = |block: usize| self.kept[block] as f64 / costs[block].max(1e-6);
        self.order.sort_by(|a, b| worth(*b).total_cmp(&worth(*a)).then(a.cmp(b)));
        Ok(())
    }

    /// What part of a step of the largest shape is computed again.
    fn again(&mut self, how: &Checkpointing) -> Result<f64> {
        Ok(self.recording.flops(self.shapes[0], how)? / self.plain.max(1.) - 1.)
    }

    /// These blocks are checkpointed.
    fn checkpointing(&self, blocks: &BTreeSet<usize>) -> Checkpointing {
        match blocks.len() {
            0 => Checkpointing::None,
            count if count == self.count() => Checkpointing::All,
            _ => Checkpointing::Chosen(Rc::new(blocks.clone())),
        }
    }

    /// The first `count` blocks of the order.
    fn first(&self, count: usize) -> BTreeSet<usize> {
        self.order[..count].iter().copied().collect()
    }

    fn bytes(&mut self, shape: StepShape, blocks: &BTreeSet<usize>) -> Result<StepBytes> {
        let (trace, inputs) = self.recording.step(shape, &self.checkpointing(blocks))?;
        // The first step of a shape takes its buffers one by one; later ones lie in the arena.
        let arena = (trace.layout().total() + trace.outliving()).max(trace.peak());
        Ok(StepBytes { arena, inputs: 2 * inputs })
    }

    fn of_largest(&mut self, blocks: &BTreeSet<usize>) -> Result<StepBytes> {
        self.bytes(self.shapes[0], blocks)
    }

    /// The least bytes of a step of the largest shape.
    pub fn least(&mut self) -> Result<StepBytes> {
        self.of_largest(&self.first(self.count()))
    }

    /// The largest over all shapes: they share one arena, each has inputs of its own; and the inputs of
    /// all but the largest.
    fn of_all(&mut self, blocks: &BTreeSet<usize>) -> Result<(StepBytes, usize)> {
        let (mut most, mut others) = (self.of_largest(blocks)?, 0);
        for shape in self.shapes.clone().into_iter().skip(1) {
            let bytes = self.bytes(shape, blocks)?;
            most.arena = most.arena.max(bytes.arena);
            others += bytes.inputs;
        }
        most.inputs += others;
        Ok((most, others))
    }

    /// Bytes of the steps with these blocks checkpointed, if they are at most `limit` and a run in so
    /// much memory comes to its end.
    fn fitting(
        &mut self,
        blocks: &BTreeSet<usize>,
        limit: usize,
        rehearsal: &Rehearsal<'_>,
    ) -> Result<Option<StepBytes>> {
        let (bytes, others) = self.of_all(blocks)?;
        if bytes.total() > limit {
            return Ok(None);
        }
        let (largest, how) = (self.shapes[0], self.checkpointing(blocks));
        Ok(rehearsal.run(largest, &how, others)?.map(|_| bytes))
    }

    /// The blocks that cost least to compute again with which the steps take at most `limit` bytes;
    /// `None` if none suffice.
    fn cheapest(
        &mut self,
        limit: usize,
        rehearsal: &Rehearsal<'_>,
    ) -> Result<Option<(BTreeSet<usize>, StepBytes)>> {
        let all = self.count();
        if let Some(bytes) = self.fitting(&BTreeSet::new(), limit, rehearsal)? {
            return Ok(Some((BTreeSet::new(), bytes)));
        }
        if self.least()?.total() > limit {
            return Ok(None);
        }
        self.put_in_order()?;
        let (mut low, mut high) = (1, all);
        while low < high {
            let middle = (low + high) / 2;
            match self.of_largest(&self.first(middle))?.total() <= limit {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        // Other shapes, and what allocators round up, can ask for a little more.
        for count in low..=all {
            let blocks = self.first(count);
            if let Some(bytes) = self.fitting(&blocks, limit, rehearsal)? {
                return Ok(Some((blocks, bytes)));
            }
        }
        Ok(None)
    }
}

/// A way to keep things, from the best to the smallest.
#[derive(Clone, Copy)]
pub(super) struct Level<'a> {
    eight_bit: bool,
    fp8: bool,
    pub optimizer: &'a Choice,
}

/// First what changes the result least: an optimizer's state in 8 bits before the frozen weights, and
/// these alone before both.
pub(super) fn levels<'a>(wishes: &Wishes<'a>, dtype: DType) -> Vec<Level<'a>> {
    let can_pack = dtype.size() > DType::F8.size();
    let weights = if wishes.fp8 || !can_pack { vec![wishes.fp8] } else { vec![false, true] };
    let level = |fp8| {
        let plain = Level { eight_bit: false, fp8, optimizer: wishes.optimizer };
        let smaller = wishes.eight_bit.map(|optimizer| Level { eight_bit: true, fp8, optimizer });
        [plain].into_iter().chain(smaller)
    };
    weights.into_iter().flat_map(level).collect()
}

/// Most bytes of a process beside the steps' own, and what of them is before the training.
struct Phases {
    /// The VAE in the training, where latents are not cached: all, its weights.
    vae: Option<(usize, usize)>,
    /// Images that are encoded together before the training, and most bytes meanwhile.
    caching: Option<(usize, usize)>,
}

/// Plans how images are encoded: as many together as asked for, fewer where the limit asks for it.
fn plan_images(
    subject: &Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    limit: usize,
) -> Result<Phases> {
    let vae = VaeRecording::new(subject.parts.vae, facts, subject.vae_dtype)?;
    let ([asked, height, width], before) = wishes.images;
    if !before {
        let all = vae.encode([asked, height, width])?;
        return Ok(Phases { vae: Some((all, vae.weights)), caching: None });
    }
    let mut together = asked;
    loop {
        let bytes = vae.encode([together, height, width])?;
        if bytes + OVERHEAD <= limit {
            return Ok(Phases { vae: None, caching: Some((together, bytes)) });
        }
        if together == 1 {
            refuse_encoding(bytes + OVERHEAD, limit, [height, width])?;
        }
        together /= 2;
    }
}

/// Plans a run on a card like `facts`, whose process may use `limit` bytes.
pub fn choose(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    limit: usize,
) -> Result<CardPlan> {
    refuse_too_little(limit)?;
    let mut smallest = usize::MAX;
    let images = plan_images(&subject, wishes, facts, limit)?;
    for level in levels(wishes, subject.dtype) {
        let stored = if level.fp8 { DType::F8 } else { subject.dtype };
        let mut recording = Recording::new(subject, facts, stored, level.optimizer)?;
        let captions = recording.captions;
        let before = captions.map_or(0, |bytes| bytes + OVERHEAD);
        let resident = recording.resident.total() + images.vae.map_or(0, |(all, _)| all);
        let left = limit.saturating_sub(OVERHEAD + resident);
        let rehearsal = Rehearsal {
            subject,
            facts,
            limit: limit - images.vae.map_or(0, |(all, _)| all).min(limit),
            stored,
            optimizer: level.optimizer,
            images: images
                .caching
                .map(|(together, _)| [together, wishes.images.0[1], wishes.images.0[2]]),
        };
        let mut steps = Steps::new(&mut recording, wishes.shapes)?;
        let every: BTreeSet<usize> = (0..steps.count()).collect();
        let found = match wishes.checkpointing {
            _ if before > limit => None,
            true => steps.fitting(&every, left, &rehearsal)?.map(|bytes| (every.clone(), bytes)),
            false => steps.cheapest(left, &rehearsal)?,
        };
        let Some((blocks, bytes)) = found else {
            let least = OVERHEAD + resident + steps.least()?.total();
            smallest = smallest.min(least.max(before));
            continue;
        };
        let checkpointing = steps.checkpointing(&blocks);
        let again = steps.again(&checkpointing)?;
        let shapes = steps.shapes.len();
        let lowered = images.caching.map(|(together, _)| together);
        let chosen = Chosen {
            checkpointing,
            eight_bit: level.eight_bit,
            fp8: level.fp8,
            vae_batch: lowered.filter(|together| *together < wishes.images.0[0]),
            tiled_samples: false,
        };
        let mut plan = CardPlan {
            rows: rows(&recording, (bytes, shapes), images.vae, level.fp8, subject.dtype),
            caching: images.caching.map(|(_, bytes)| bytes),
            captions,
            sampling: None,
            limit,
            notes: Vec::new(),
            chosen,
        };
        plan.notes = reasons(&plan, wishes, (blocks.len(), every.len(), again));
        return Ok(plan);
    }
    refuse(subject, wishes, facts, (smallest, limit))
}

fn rows(
    recording: &Recording<'_>,
    (bytes, shapes): (StepBytes, usize),
    vae: Option<(usize, usize)>,
    fp8: bool,
    dtype: DType,
) -> Vec<Row> {
    let resident = recording.resident;
    let name = match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "fp16",
        _ => "float32",
    };
    let frozen = if fp8 {
        format!("fp8 with a scale for each channel, computed in {name}")
    } else {
        name.to_owned()
    };
    let text = match resident.text_encoder {
        0 => "leaves the card when the captions are encoded".to_owned(),
        _ => name.to_owned(),
    };
    let shapes = match shapes {
        1 => "one bucket shape".to_owned(),
        count => format!("one for {count} bucket shapes"),
    };
    let mut rows = vec![
        ("U-Net", resident.unet, frozen),
        ("text encoder", resident.text_encoder, text),
        ("trained weights", resident.trained, "float32".to_owned()),
        ("their working copy", resident.working, name.to_owned()),
        ("gradient", resident.gradient, "float32".to_owned()),
        ("optimizer state", resident.optimizer, String::new()),
        (ARENA, bytes.arena, shapes),
        ("inputs", bytes.inputs, "this batch and the next".to_owned()),
        ("libraries' scratch", WORKSPACE, String::new()),
        ("CUDA context", CONTEXT_BYTES, "an allowance".to_owned()),
    ];
    if let Some((all, weights)) = vae {
        rows.push(("VAE", weights, "latents are not cached".to_owned()));
        rows.push(("VAE's scratch", all - weights, String::new()));
    }
    let row =
        |(name, bytes, note): (&str, usize, String)| Row { name: name.to_owned(), bytes, note };
    rows.into_iter().map(row).collect()
}

/// What was given up, and why.
fn reasons(
    plan: &CardPlan,
    wishes: &Wishes<'_>,
    (count, all, again): (usize, usize, f64),
) -> Vec<String> {
    let again = format!("{:.0} % of a step's arithmetic is done again", 100. * again);
    let limit = show_bytes(plan.limit);
    let mut notes = Vec::new();
    if wishes.checkpointing {
        notes.push(format!(
            "all blocks are checkpointed: `gradient_checkpointing` asks for it; {again}"
        ));
    } else if count > 0 {
        notes.push(format!("{count} of {all} blocks are checkpointed to fit {limit}; {again}"));
    } else {
        notes.push("nothing has to be checkpointed".to_owned());
    }
    if plan.chosen.eight_bit {
        notes.push(format!("AdamW's state is kept in 8 bits (AdamW8bit) to fit {limit}"));
    }
    if plan.chosen.fp8 && !wishes.fp8 {
        notes.push(format!("the frozen U-Net is kept in 8 bits (`fp8_base`) to fit {limit}"));
    }
    if let Some(together) = plan.chosen.vae_batch {
        notes.push(format!("`vae_batch_size` is lowered to fit {limit}: {together}"));
    }
    notes
}
