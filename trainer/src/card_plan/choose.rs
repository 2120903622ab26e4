//! What is given up so that a run fits: as little as possible, in a fixed order.

use std::collections::BTreeSet;
use std::rc::Rc;

use anyhow::{Result, bail};
use engine::cuda::driver::{CardFacts, WORKSPACE};
use engine::{Checkpointing, DType};

use super::measure::{Recording, StepShape, Subject};
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

/// One part in so many of a step's peak is allowed for gaps where buffers are taken one by one.
const FIRST_STEP_GAPS: usize = 25;

/// Sizes of a step of the largest shape as blocks are checkpointed.
struct Steps<'r, 'a> {
    recording: &'r mut Recording<'a>,
    shapes: Vec<StepShape>,
    /// Blocks, those that keep most first.
    order: Vec<usize>,
}

/// Bytes of a step: its arena, what outlives it, its inputs (twice: the next batch waits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct StepBytes {
    arena: usize,
    inputs: usize,
}

impl StepBytes {
    fn total(self) -> usize {
        self.arena + self.inputs
    }
}

impl<'r, 'a> Steps<'r, 'a> {
    fn new(recording: &'r mut Recording<'a>, shapes: &[StepShape]) -> Result<Self> {
        let mut shapes = shapes.to_vec();
        shapes.sort_by_key(|shape| std::cmp::Reverse((shape.pixels(), shape.chunks, *shape)));
        shapes.dedup();
        let Some(largest) = shapes.first() else { bail!("there is no batch to plan for") };
        let kept = recording.step(*largest, &Checkpointing::None)?.0.segments();
        let mut order: Vec<usize> = (0..kept.len()).collect();
        order.sort_by_key(|index| (std::cmp::Reverse(kept[*index]), *index));
        Ok(Self { recording, shapes, order })
    }

    /// The first `count` blocks of the order.
    fn checkpointing(&self, count: usize) -> Checkpointing {
        match count {
            0 => Checkpointing::None,
            _ if count >= self.order.len() => Checkpointing::All,
            _ => {
                let chosen: BTreeSet<usize> = self.order[..count].iter().copied().collect();
                Checkpointing::Chosen(Rc::new(chosen))
            }
        }
    }

    fn bytes(&mut self, shape: StepShape, count: usize) -> Result<StepBytes> {
        let (trace, inputs) = self.recording.step(shape, &self.checkpointing(count))?;
        // The first step of a shape takes its buffers one by one, with gaps between them; later ones
        // lie in the arena.
        let gaps = trace.peak() / FIRST_STEP_GAPS;
        let arena = (trace.layout().total() + trace.outliving()).max(trace.peak() + gaps);
        Ok(StepBytes { arena, inputs: 2 * inputs })
    }

    fn of_largest(&mut self, count: usize) -> Result<StepBytes> {
        self.bytes(self.shapes[0], count)
    }

    /// The largest over all shapes: they share one arena, each has inputs of its own.
    fn of_all(&mut self, count: usize) -> Result<StepBytes> {
        let mut most = StepBytes::default();
        for shape in self.shapes.clone() {
            let bytes = self.bytes(shape, count)?;
            most.arena = most.arena.max(bytes.arena);
            most.inputs += bytes.inputs;
        }
        Ok(most)
    }

    /// The fewest blocks with which the steps take at most `limit` bytes; `None` if none suffice.
    fn fewest(&mut self, limit: usize) -> Result<Option<(usize, StepBytes)>> {
        let all = self.order.len();
        if self.of_largest(all)?.total() > limit {
            return Ok(None);
        }
        let (mut low, mut high) = (0, all);
        while low < high {
            let middle = (low + high) / 2;
            match self.of_largest(middle)?.total() <= limit {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        // Other shapes and the gaps of a layout can ask for a little more.
        for count in low..=all {
            let bytes = self.of_all(count)?;
            if bytes.total() <= limit {
                return Ok(Some((count, bytes)));
            }
        }
        Ok(None)
    }
}

/// A way to keep things, from the best to the smallest.
struct Level<'a> {
    eight_bit: bool,
    fp8: bool,
    optimizer: &'a Choice,
}

fn levels<'a>(wishes: &Wishes<'a>, dtype: DType) -> Vec<Level<'a>> {
    let plain = Level { eight_bit: false, fp8: wishes.fp8, optimizer: wishes.optimizer };
    let mut levels = vec![plain];
    if let Some(optimizer) = wishes.eight_bit {
        levels.push(Level { eight_bit: true, fp8: wishes.fp8, optimizer });
    }
    if !wishes.fp8 && dtype.size() > DType::F8.size() {
        let optimizer = wishes.eight_bit.unwrap_or(wishes.optimizer);
        levels.push(Level { eight_bit: wishes.eight_bit.is_some(), fp8: true, optimizer });
    }
    levels
}

/// Plans a run on a card like `facts`, whose process may use `limit` bytes.
pub fn choose(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    limit: usize,
) -> Result<CardPlan> {
    let mut smallest = usize::MAX;
    for level in levels(wishes, subject.dtype) {
        let stored = if level.fp8 { DType::F8 } else { subject.dtype };
        let mut recording = Recording::new(subject, facts, stored, level.optimizer)?;
        let (encoding, vae) = recording.encode_images(wishes.images.0)?;
        let caching = wishes.images.1;
        let resident = recording.resident.total() + if caching { 0 } else { encoding };
        let left = limit.saturating_sub(OVERHEAD + resident);
        let mut steps = Steps::new(&mut recording, wishes.shapes)?;
        let all = steps.order.len();
        let found = match wishes.checkpointing {
            true => Some((all, steps.of_all(all)?)).filter(|(_, bytes)| bytes.total() <= left),
            false => steps.fewest(left)?,
        };
        let Some((count, bytes)) = found else {
            smallest = smallest.min(OVERHEAD + resident + steps.of_all(all)?.total());
            continue;
        };
        if caching && encoding + OVERHEAD > limit {
            refuse_encoding(encoding + OVERHEAD, limit, wishes.images.0)?;
        }
        let checkpointing = steps.checkpointing(count);
        let shapes = steps.shapes.len();
        let chosen = Chosen { checkpointing, eight_bit: level.eight_bit, fp8: level.fp8 };
        let vae = if caching { None } else { Some((vae, encoding - vae)) };
        let mut plan = CardPlan {
            rows: rows(&recording, (bytes, shapes), vae, level.fp8, subject.dtype),
            caching: caching.then_some(encoding),
            sampling: None,
            limit,
            notes: Vec::new(),
            chosen,
        };
        plan.notes = reasons(&plan, wishes, (count, all));
        return Ok(plan);
    }
    refuse(subject, wishes, facts, (smallest, limit))
}

fn refuse_encoding(needs: usize, limit: usize, [batch, height, width]: [usize; 3]) -> Result<()> {
    bail!(
        "to encode {batch} images of {width}x{height} takes {} of the card, it may use: {}\nhint: \
         lower `vae_batch_size`, or cache the latents on another machine with \
         `cache_latents_to_disk`",
        show_bytes(needs),
        show_bytes(limit)
    )
}

/// Says what the least is that the run takes, and what would make it fit.
fn refuse(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    (smallest, limit): (usize, usize),
) -> Result<CardPlan> {
    let mut hints = Vec::new();
    let largest = wishes.shapes.iter().map(|shape| shape.batch).max().unwrap_or(1);
    let mut batch = largest;
    while batch > 1 && hints.is_empty() {
        batch /= 2;
        let smaller = |shape: &StepShape| StepShape { batch: shape.batch.min(batch), ..*shape };
        let shapes: Vec<StepShape> = wishes.shapes.iter().map(smaller).collect();
        let fewer = Wishes { shapes: &shapes, images: wishes.images, ..*wishes };
        if fits_at_least(subject, &fewer, facts, limit)? {
            hints.push(format!(
                "`train_batch_size = {batch}` with `gradient_accumulation_steps = {}` fits",
                largest.div_ceil(batch)
            ));
        }
    }
    if subject.dtype == DType::F32 {
        hints.push("`mixed_precision = \"bf16\"` halves weights and activations".to_owned());
    }
    if !subject.encoded {
        hints.push("`network_train_unet_only` leaves the text encoder untrained".to_owned());
    }
    hints.push("a lower resolution or `network_dim` takes less".to_owned());
    bail!(
        "the run takes at least {} of the card with every block checkpointed{}, it may use: \
         {}\nhint: {}",
        show_bytes(smallest),
        if wishes.eight_bit.is_some() { ", 8-bit AdamW and `fp8_base`" } else { " and `fp8_base`" },
        show_bytes(limit),
        hints.join("; ")
    )
}

/// Whether the smallest way fits.
fn fits_at_least(
    subject: Subject<'_>,
    wishes: &Wishes<'_>,
    facts: &CardFacts,
    limit: usize,
) -> Result<bool> {
    let Some(level) = levels(wishes, subject.dtype).pop() else { return Ok(false) };
    let mut recording = Recording::new(subject, facts, DType::F8, level.optimizer)?;
    let encoding = match wishes.images.1 {
        true => 0,
        false => recording.encode_images(wishes.images.0)?.0,
    };
    let resident = recording.resident.total() + encoding;
    let mut steps = Steps::new(&mut recording, wishes.shapes)?;
    let all = steps.order.len();
    Ok(OVERHEAD + resident + steps.of_largest(all)?.total() <= limit)
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
    let frozen = if fp8 { format!("fp8, computed in {name}") } else { name.to_owned() };
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
    if let Some((weights, scratch)) = vae {
        rows.push(("VAE", weights, "latents are not cached".to_owned()));
        rows.push(("VAE's scratch", scratch, String::new()));
    }
    let row =
        |(name, bytes, note): (&str, usize, String)| Row { name: name.to_owned(), bytes, note };
    rows.into_iter().map(row).collect()
}

/// What was given up, and why.
fn reasons(plan: &CardPlan, wishes: &Wishes<'_>, (count, all): (usize, usize)) -> Vec<String> {
    let limit = show_bytes(plan.limit);
    let mut notes = Vec::new();
    if wishes.checkpointing {
        notes.push("all blocks are checkpointed: `gradient_checkpointing` asks for it".to_owned());
    } else if count > 0 {
        notes.push(format!(
            "{count} of {all} blocks are checkpointed, those that keep most first, to fit {limit}"
        ));
    } else {
        notes.push("nothing has to be checkpointed".to_owned());
    }
    if plan.chosen.eight_bit {
        notes.push(format!("AdamW's state is kept in 8 bits (AdamW8bit) to fit {limit}"));
    }
    if plan.chosen.fp8 && !wishes.fp8 {
        notes.push(format!("the frozen U-Net is kept in 8 bits (`fp8_base`) to fit {limit}"));
    }
    notes
}
