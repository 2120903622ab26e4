//! Transposes 16 by 16 blocks of 32-bit words, the way from `[n,k]` weights to packed slivers.

use super::features::Level;

/// `to[w·to_pitch + c] = word w of column c`, where column `c` starts at element `c·stride` of `from`
/// and a word is 4 bytes: one f32 or two bf16.
pub(super) fn transpose_words<T: bytemuck::Pod>(
    from: &[T],
    stride: usize,
    to: &mut [u32],
    to_pitch: usize,
) {
    transpose_at(Level::best(), from, stride, to, to_pitch);
}

fn transpose_at<T: bytemuck::Pod>(
    level: Level,
    from: &[T],
    stride: usize,
    to: &mut [u32],
    to_pitch: usize,
) {
    let per = 4 / size_of::<T>();
    assert!(from.len() >= 15 * stride + 16 * per && to.len() >= 15 * to_pitch + 16);
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx2 {
        let pitch = stride * size_of::<T>();
        let (from, to) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr());
        // SAFETY: the processor has the level; the lengths were just checked.
        unsafe {
            if level >= Level::Avx512 {
                x86::transpose16(from, pitch, to, to_pitch);
                return;
            }
            for (column, word) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                let to = to.add(word * to_pitch + column);
                x86::transpose8(from.add(column * pitch + word * 4), pitch, to, to_pitch);
            }
        }
        return;
    }
    let _ = level;
    for column in 0..16 {
        let words = bytemuck::cast_slice::<T, u8>(&from[column * stride..][..16 * per]);
        for (w, word) in words.chunks_exact(4).enumerate() {
            to[w * to_pitch + column] = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Bytes: the block after the next along k.
    const AHEAD: usize = 256;

    /// # Safety
    /// AVX-512; 16 rows of 64 bytes, `pitch` bytes apart, can be read and 16 rows of 16 words,
    /// `to_pitch` words apart, written.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose16(from: *const u8, pitch: usize, to: *mut u32, to_pitch: usize) {
        let mut r = [_mm512_setzero_si512(); 16];
        for (i, r) in r.iter_mut().enumerate() {
            // SAFETY: row `i < 16`; what is asked for ahead is never read here.
            unsafe {
                *r = _mm512_loadu_si512(from.add(i * pitch).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(i * pitch + AHEAD).cast());
            }
        }
        // Within 128-bit lanes: words, then pairs of words.
        let mut s = r;
        for i in 0..8 {
            s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            let q = &s[4 * i..4 * i + 4];
            r[4 * i] = _mm512_unpacklo_epi64(q[0], q[2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(q[0], q[2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(q[1], q[3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(q[1], q[3]);
        }
        // Row `4·i + j` now holds word `j` of each lane of rows `4i..4i+4`: move whole lanes.
        for j in 0..4 {
            let (a, b, c, d) = (r[j], r[4 + j], r[8 + j], r[12 + j]);
            let even = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
            let odd = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
            s[j] = _mm512_shuffle_i32x4::<0x88>(even.0, even.1);
            s[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1);
            s[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even.0, even.1);
            s[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1);
        }
        for (i, s) in s.iter().enumerate() {
            // SAFETY: row `i < 16`.
            unsafe { _mm512_storeu_si512(to.add(i * to_pitch).cast(), *s) };
        }
    }

    /// # Safety
    /// AVX2; 8 rows of 32 bytes, `pitch` bytes apart, can be read and 8 rows of 8 words, `to_pitch`
    /// words apart, written.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose8(from: *const u8, pitch: usize, to: *mut u32, to_pitch: usize) {
        let mut r = [_mm256_setzero_si256(); 8];
        for (i, r) in r.iter_mut().enumerate() {
            // SAFETY: row `i < 8`; what is asked for ahead is never read here.
            unsafe {
                *r = _mm256_loadu_si256(from.add(i * pitch).cast());
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(i * pitch + AHEAD).cast());
            }
        }
        let mut s = r;
        for i in 0..4 {
            s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            let q = &s[4 * i..4 * i + 4];
            r[4 * i] = _mm256_unpacklo_epi64(q[0], q[2]);
            r[4 * i + 1] = _mm256_unpackhi_epi64(q[0], q[2]);
            r[4 * i + 2] = _mm256_unpacklo_epi64(q[1], q[3]);
            r[4 * i + 3] = _mm256_unpackhi_epi64(q[1], q[3]);
        }
        for j in 0..4 {
            s[j] = _mm256_permute2x128_si256::<0x20>(r[j], r[4 + j]);
            s[4 + j] = _mm256_permute2x128_si256::<0x31>(r[j], r[4 + j]);
        }
        for (i, s) in s.iter().enumerate() {
            // SAFETY: row `i < 8`.
            unsafe { _mm256_storeu_si256(to.add(i * to_pitch).cast(), *s) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_columns_become_rows() {
        let from: Vec<f32> = (0..16 * 20).map(|x| x as f32).collect();
        for level in Level::available() {
            let mut to = vec![0u32; 16 * 32];
            transpose_at(level, &from, 20, &mut to, 32);
            for c in 0..16 {
                for w in 0..16 {
                    assert_eq!(f32::from_bits(to[w * 32 + c]), from[c * 20 + w], "{level:?}");
                }
            }
        }
    }

    #[test]
    fn pairs_stay_together() {
        let from: Vec<u16> = (0..16 * 40).collect();
        for level in Level::available() {
            let mut to = vec![0u32; 16 * 16];
            transpose_at(level, &from, 40, &mut to, 16);
            for c in 0..16u32 {
                for w in 0..16u32 {
                    let low = c * 40 + 2 * w;
                    assert_eq!(to[(w * 16 + c) as usize], low | ((low + 1) << 16), "{level:?}");
                }
            }
        }
    }
}
