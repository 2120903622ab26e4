//! Joins, cuts, upsampling and row lookup: moved numbers are the same to the bit.

use super::{Check, for_types, random_on_both, relative_error, worst_error};
use crate::{Device, EngineError, Ids, Result, Tensor};

/// All checks of this kind.
pub fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    // Widths that are whole in units of 2, 4, 8 and 16 bytes.
    for widths in [(1, 1), (3, 40), (8, 16), (5, 2), (40, 4), (12, 0)] {
        checks.extend(joins(&[3, 77], widths));
        checks.extend(joins(&[1], widths));
    }
    for shape in [[1, 1, 1, 1], [3, 5, 7, 3], [2, 4, 3, 40], [1, 2, 2, 6]] {
        checks.extend(upsampling(shape));
    }
    for (rows, width) in [(1, 1), (77, 3), (10, 40), (3, 6)] {
        checks.extend(lookup(rows, width));
    }
    let big = [joins(&[2, 64, 64], (640, 320)), upsampling([4, 32, 32, 640]), lookup(49_408, 768)];
    checks.extend(big.into_iter().flatten().map(Check::big));
    checks
}

fn joins(head: &'static [usize], (wa, wb): (usize, usize)) -> Vec<Check> {
    let name = format!("layout concat and split {head:?}x[{wa}+{wb}]");
    for_types(&name, 0., move |device, dtype| {
        let (card, cpu) = (device.backend(), Device::Cpu.backend());
        let shape = |last: usize| head.iter().copied().chain([last]).collect::<Vec<_>>();
        let (a, a_cpu) = random_on_both(device, &shape(wa), 1, dtype)?;
        let (b, b_cpu) = random_on_both(device, &shape(wb), 2, dtype)?;
        let joined = card.concat_last(&a, &b)?;
        let (first, rest) = card.split_last(&joined, wa)?;
        let moved = worst_error([
            (&joined, &cpu.concat_last(&a_cpu, &b_cpu)?),
            (&first, &a_cpu),
            (&rest, &b_cpu),
        ])?;
        // A view that begins one element in can be moved by single elements only.
        let (x, x_cpu) = random_on_both(device, &[joined.len() + 1], 3, dtype)?;
        let (x, x_cpu) = (x.view(1, &shape(wa + wb))?, x_cpu.view(1, &shape(wa + wb))?);
        let (got, want) = (card.split_last(&x, wa)?, cpu.split_last(&x_cpu, wa)?);
        let (upper, lower) = (card.concat_rows(&x, &joined)?, cpu.concat_last(&a_cpu, &b_cpu)?);
        let below = cpu.concat_rows(&x_cpu, &lower)?;
        let pairs = [(&got.0, &want.0), (&got.1, &want.1), (&upper, &below)];
        Ok(moved.max(worst_error(pairs)?))
    })
}

fn upsampling(shape: [usize; 4]) -> Vec<Check> {
    let name = |operation: &str| format!("layout {operation} {shape:?}");
    let mut checks = for_types(&name("upsample2x"), 0., move |device, dtype| {
        let (x, x_cpu) = random_on_both(device, &shape, 1, dtype)?;
        let want = Device::Cpu.backend().upsample2x(&x_cpu)?;
        relative_error(&device.backend().upsample2x(&x)?, &want)
    });
    checks.extend(for_types(&name("upsample2x_backward"), 1., move |device, dtype| {
        let [b, h, w, c] = shape;
        let above = [b, 2 * h, 2 * w, c];
        let (dy, dy_cpu) = random_on_both(device, &above, 2, dtype)?;
        let want = Device::Cpu.backend().upsample2x_backward(&dy_cpu)?;
        relative_error(&device.backend().upsample2x_backward(&dy)?, &want)
    }));
    checks
}

fn lookup(rows: usize, width: usize) -> Vec<Check> {
    for_types(&format!("layout embedding [{rows},{width}]"), 0., move |device, dtype| {
        let (table, table_cpu) = random_on_both(device, &[rows, width], 1, dtype)?;
        let ids: Vec<u32> = (0..77).map(|i| (i * 31 + 5) % rows as u32).collect();
        let got = device.backend().embedding(&table, &Ids::new(device, &ids)?)?;
        let ids = Ids::new(Device::Cpu, &ids)?;
        let want = Device::Cpu.backend().embedding(&table_cpu, &ids)?;
        Ok(relative_error(&got, &want)?.max(outside(device, &table, &table_cpu)?))
    })
}

/// Ids outside the table read its last row on a card, and are an error on the CPU.
fn outside(device: Device, table: &Tensor, table_cpu: &Tensor) -> Result<f32> {
    let ids = [table.dim(0) as u32, u32::MAX];
    match device.backend().embedding(table, &Ids::new(device, &ids)?) {
        Ok(got) => {
            let last = [table.dim(0) as u32 - 1; 2];
            let ids = Ids::new(Device::Cpu, &last)?;
            relative_error(&got, &Device::Cpu.backend().embedding(table_cpu, &ids)?)
        }
        Err(EngineError::Shape { .. }) if device == Device::Cpu => Ok(0.),
        Err(error) => Err(error),
    }
}
