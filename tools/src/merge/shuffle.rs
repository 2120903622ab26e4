//! `--shuffle`: the ranks of every module in another order, which does not change their product.

use crate::matrix::Matrix;

/// The columns of `up` and the rows of `down` in an order that seed and name of the module decide.
pub(super) fn shuffled(up: &Matrix, down: &Matrix, seed: u64, name: &str) -> (Matrix, Matrix) {
    let order = order(down.rows, seed, name);
    let mut columns = Vec::with_capacity(up.values.len());
    for row in 0..up.rows {
        let row = up.row(row);
        columns.extend(order.iter().map(|at| row[*at]));
    }
    let rows = order.iter().flat_map(|at| down.row(*at)).copied().collect();
    (Matrix::new(up.rows, up.cols, columns), Matrix::new(down.rows, down.cols, rows))
}

/// Fisher and Yates' shuffle of `0..count`.
fn order(count: usize, seed: u64, name: &str) -> Vec<usize> {
    let mut state = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // A count far below 2^64: the remainder's bias is not measurable.
        order.swap(last, (mix(state) % (last as u64 + 1)) as usize);
    }
    order
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_keeps_its_partner() {
        let up = Matrix::new(2, 5, (0..10).map(|i| i as f32).collect());
        let down = Matrix::new(5, 1, (0..5).map(|i| i as f32).collect());
        let (new_up, new_down) = shuffled(&up, &down, 3, "lora_unet_x");
        assert_ne!(new_down, down);
        for (rank, value) in new_down.values.iter().enumerate() {
            assert_eq!([new_up.row(0)[rank], new_up.row(1)[rank]], [*value, value + 5.0]);
        }
        let mut sorted = new_down.values.clone();
        sorted.sort_by(f32::total_cmp);
        assert_eq!(sorted, down.values);
    }

    #[test]
    fn seed_and_module_decide() {
        let of = |seed, name| order(16, seed, name);
        assert_eq!(of(1, "a"), of(1, "a"));
        assert_ne!(of(1, "a"), of(2, "a"));
        assert_ne!(of(1, "a"), of(1, "b"));
        assert_eq!(order(1, 1, "a"), [0]);
        assert!(order(0, 1, "a").is_empty());
    }
}
