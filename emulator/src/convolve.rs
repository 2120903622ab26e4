//! Convolutions in their plainest form: each pixel of the window added in turn.

use engine::cuda::driver::{Convolution, Direction};
use engine::{DType, EngineError, Result};

use crate::matmul::{numbers, store};
use crate::memory::Blocks;

/// Whether a card's library is expected to have it: it pads alike on both sides.
pub(crate) fn has(p: &Convolution) -> bool {
    p.pad_before == p.pad_after
}

/// Elements of input, kernel and output.
fn sizes(p: &Convolution) -> [usize; 3] {
    let kernel = p.output[3] * p.kernel.0 * p.kernel.1 * p.input[3];
    [p.input.iter().product(), kernel, p.output.iter().product()]
}

/// Fails unless shapes and operands fit each other.
pub(crate) fn check(p: &Convolution, blocks: &Blocks) -> Result<()> {
    let refused = |why: String| EngineError::Card { what: "`convolve`".into(), why };
    if !matches!(p.dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Err(refused(format!("elements of type {:?}", p.dtype)));
    }
    let length = |size: usize, kernel: usize| {
        let room = (size + p.pad_before + p.pad_after).checked_sub(kernel)?;
        Some(room / p.stride.max(1) + 1)
    };
    let want = (length(p.input[1], p.kernel.0), length(p.input[2], p.kernel.1));
    let got = (Some(p.output[1]), Some(p.output[2]));
    if want != got || p.input[0] != p.output[0] || p.stride == 0 || sizes(p).contains(&0) {
        return Err(refused(format!("shapes that do not fit: {:?} to {:?}", p.input, p.output)));
    }
    for (address, count) in [p.x, p.w, p.y].into_iter().zip(sizes(p)) {
        blocks.check("convolve", address, count * p.dtype.size())?;
    }
    Ok(())
}

/// Convolves.
pub(crate) fn run(p: &Convolution, blocks: &mut Blocks) -> Result<()> {
    let [x_len, w_len, y_len] = sizes(p);
    let w = numbers(blocks, p.w, w_len, p.dtype)?;
    match p.direction {
        Direction::Forward => {
            let x = numbers(blocks, p.x, x_len, p.dtype)?;
            let mut y = vec![0.; y_len];
            let (inner, outer) = (p.input[3], p.output[3]);
            for_each_tap(p, |tap, pixel, result| {
                let x = &x[pixel * inner..(pixel + 1) * inner];
                for (co, y) in y[result * outer..(result + 1) * outer].iter_mut().enumerate() {
                    *y += dot(x, &w[weights(p, co, tap)]);
                }
            });
            store(blocks, p.y, &y, p.dtype)
        }
        Direction::BackwardInput { accumulate } => {
            let y = numbers(blocks, p.y, y_len, p.dtype)?;
            let mut x =
                if accumulate { numbers(blocks, p.x, x_len, p.dtype)? } else { vec![0.; x_len] };
            let (inner, outer) = (p.input[3], p.output[3]);
            for_each_tap(p, |tap, pixel, result| {
                let x = &mut x[pixel * inner..(pixel + 1) * inner];
                for (co, y) in y[result * outer..(result + 1) * outer].iter().enumerate() {
                    x.iter_mut().zip(&w[weights(p, co, tap)]).for_each(|(x, w)| *x += y * w);
                }
            });
            store(blocks, p.x, &x, p.dtype)
        }
    }
}

/// The input's channels of one output channel at one place of the window.
fn weights(p: &Convolution, co: usize, tap: usize) -> std::ops::Range<usize> {
    let at = (co * p.kernel.0 * p.kernel.1 + tap) * p.input[3];
    at..at + p.input[3]
}

/// Calls `each` with a place of the window, a pixel of the input and the pixel of the output that
/// it touches there.
fn for_each_tap(p: &Convolution, mut each: impl FnMut(usize, usize, usize)) {
    let [batch, height, width, _] = p.input;
    let [_, rows, columns, _] = p.output;
    let inside = |at: usize, step: usize, size: usize| {
        (at * p.stride + step).checked_sub(p.pad_before).filter(|i| *i < size)
    };
    for (b, row, column) in (0..batch)
        .flat_map(|b| (0..rows).flat_map(move |row| (0..columns).map(move |c| (b, row, c))))
    {
        for i in 0..p.kernel.0 {
            let Some(y) = inside(row, i, height) else { continue };
            for j in 0..p.kernel.1 {
                let Some(x) = inside(column, j, width) else { continue };
                let result = (b * rows + row) * columns + column;
                each(i * p.kernel.1 + j, (b * height + y) * width + x, result);
            }
        }
    }
}

/// Sum of products, in eight lanes.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0_f32; 8];
    let (xs, ws) = (x.chunks_exact(8), w.chunks_exact(8));
    let rest: f32 = xs.remainder().iter().zip(ws.remainder()).map(|(x, w)| x * w).sum();
    for (x, w) in xs.zip(ws) {
        lanes.iter_mut().zip(x.iter().zip(w)).for_each(|(lane, (x, w))| *lane += x * w);
    }
    lanes.iter().sum::<f32>() + rest
}
