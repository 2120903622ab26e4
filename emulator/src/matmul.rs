//! Products of matrices: plain sums in f32, rounded once.

use engine::cuda::Address;
use engine::cuda::driver::{Matmul, Matrix};
use engine::{DType, EngineError, Result};
use half::{bf16, f16};

use crate::memory::Blocks;

/// Fails unless the operands are ones that a card would take.
pub(crate) fn check(p: &Matmul, blocks: &Blocks) -> Result<()> {
    let plain = |dtype| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    if !plain(p.a.dtype) || p.a.dtype != p.b.dtype {
        return Err(refused(format!("operands of types {:?} and {:?}", p.a.dtype, p.b.dtype)));
    }
    if p.d_dtype != p.a.dtype && p.d_dtype != DType::F32 {
        return Err(refused(format!("a result of type {:?} from {:?}", p.d_dtype, p.a.dtype)));
    }
    if p.m == 0 || p.n == 0 || p.k == 0 {
        return Err(refused(format!("an empty product of {}x{}x{}", p.m, p.n, p.k)));
    }
    let d = (p.d, p.m * p.n * p.d_dtype.size());
    for (operand, count) in [(p.a, p.m * p.k), (p.b, p.k * p.n)] {
        let bytes = count * operand.dtype.size();
        blocks.check("matmul", operand.address, bytes)?;
        if operand.address < d.0 + d.1 as Address && d.0 < operand.address + bytes as Address {
            return Err(refused("a result that lies in an operand".into()));
        }
    }
    blocks.check("matmul", d.0, d.1)?;
    if let Some(c) = p.c {
        blocks.check("matmul", c, d.1)?;
    }
    p.bias.map_or(Ok(()), |bias| blocks.check("matmul", bias, p.n * p.d_dtype.size()))
}

fn refused(why: String) -> EngineError {
    EngineError::Card { what: "`matmul`".into(), why }
}

/// Multiplies.
pub(crate) fn run(p: &Matmul, blocks: &mut Blocks) -> Result<()> {
    let a = operand(blocks, p.a, (p.m, p.k))?;
    let b = operand(blocks, p.b, (p.k, p.n))?;
    let mut d = product(&a, &b, (p.m, p.n, p.k));
    d.iter_mut().for_each(|x| *x *= p.alpha);
    if let Some(c) = p.c {
        let c = numbers(blocks, c, p.m * p.n, p.d_dtype)?;
        d.iter_mut().zip(c).for_each(|(d, c)| *d += c);
    }
    if let Some(bias) = p.bias {
        let bias = numbers(blocks, bias, p.n, p.d_dtype)?;
        d.chunks_mut(p.n).for_each(|row| row.iter_mut().zip(&bias).for_each(|(d, b)| *d += b));
    }
    store(blocks, p.d, &d, p.d_dtype)
}

/// `a[m,k]·b[k,n]`; four rows of `b` at a time, so that sums stay in the cache.
pub(crate) fn product(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    let mut d = vec![0.; m * n];
    for (row, out) in a.chunks(k).zip(d.chunks_mut(n)) {
        for (x, b) in row.chunks(4).zip(b.chunks(4 * n)) {
            if let [x0, x1, x2, x3] = *x {
                let (b0, rest) = b.split_at(n);
                let (b1, rest) = rest.split_at(n);
                let (b2, b3) = rest.split_at(n);
                for (i, out) in out.iter_mut().enumerate() {
                    *out += x0 * b0[i] + x1 * b1[i] + x2 * b2[i] + x3 * b3[i];
                }
            } else {
                for (x, b) in x.iter().zip(b.chunks(n)) {
                    out.iter_mut().zip(b).for_each(|(out, b)| *out += x * b);
                }
            }
        }
    }
    d
}

/// The operand in f32, not transposed.
fn operand(blocks: &Blocks, at: Matrix, (rows, columns): (usize, usize)) -> Result<Vec<f32>> {
    let stored = numbers(blocks, at.address, rows * columns, at.dtype)?;
    if !at.transposed {
        return Ok(stored);
    }
    let mut out = Vec::with_capacity(stored.len());
    for row in 0..rows {
        out.extend((0..columns).map(|column| stored[column * rows + row]));
    }
    Ok(out)
}

/// `count` numbers from `address` on.
pub(crate) fn numbers(
    blocks: &Blocks,
    address: Address,
    count: usize,
    dtype: DType,
) -> Result<Vec<f32>> {
    let bytes = blocks.read("read", address, count * dtype.size())?;
    let words = || bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match dtype {
        DType::F32 => words().map(f32::from_le_bytes).collect(),
        DType::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        DType::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(refused(format!("numbers of type {other:?}"))),
    })
}

/// Rounds `data` to `dtype` and puts it at `address`.
pub(crate) fn store(
    blocks: &mut Blocks,
    address: Address,
    data: &[f32],
    dtype: DType,
) -> Result<()> {
    let bytes = blocks.write("write", address, data.len() * dtype.size())?;
    match dtype {
        DType::F32 => put(bytes, data, f32::to_le_bytes),
        DType::BF16 => put(bytes, data, |x| bf16::from_f32(x).to_le_bytes()),
        DType::F16 => put(bytes, data, |x| f16::from_f32(x).to_le_bytes()),
        other => return Err(refused(format!("numbers of type {other:?}"))),
    }
    Ok(())
}

fn put<const N: usize>(bytes: &mut [u8], data: &[f32], round: impl Fn(f32) -> [u8; N]) {
    bytes.chunks_exact_mut(N).zip(data).for_each(|(to, x)| to.copy_from_slice(&round(*x)));
}
