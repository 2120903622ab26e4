// What a warp does together, by the fragment layouts of the PTX ISA (sections on `mma.m16n8k16` and
// `ldmatrix`).
#include "prelude.cuh"
#include "machine.h"

namespace emulated {

static void shuffle(void* const* requests) {
    for (int lane = 0; lane < 32; lane++) {
        Shuffle* to = static_cast<Shuffle*>(requests[lane]);
        to->result = static_cast<Shuffle*>(requests[to->source])->value;
    }
}

static void vote(void* const* requests) {
    u32 result = 0;
    for (int lane = 0; lane < 32; lane++)
        result |= static_cast<Vote*>(requests[lane])->set << lane;
    for (int lane = 0; lane < 32; lane++) static_cast<Vote*>(requests[lane])->result = result;
}

// Lanes 8j to 8j+7 give the rows of matrix j, 8 x 8 of 16 bits; register j of lane i gets elements
// 2(i mod 4) and the next of row i/4, or, transposed, of column i/4.
static const char* load(void* const* requests, int count, bool transposed) {
    for (int matrix = 0; matrix < count; matrix++) {
        u16 rows[8][8];
        for (int row = 0; row < 8; row++) {
            const void* from = static_cast<Load*>(requests[8 * matrix + row])->row;
            if (reinterpret_cast<size_t>(from) % 16)
                return "`ldmatrix` from an address that is not a multiple of 16";
            touch("reads", from, 16);
            std::memcpy(rows[row], from, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            int across = lane / 4, along = 2 * (lane % 4);
            u32 lo = transposed ? rows[along][across] : rows[across][along];
            u32 hi = transposed ? rows[along + 1][across] : rows[across][along + 1];
            static_cast<Load*>(requests[lane])->registers[matrix] = lo | hi << 16;
        }
    }
    return nullptr;
}

template <class T>
static float half_of(u32 bits, int upper) {
    T x;
    x.x = static_cast<u16>(upper ? bits >> 16 : bits);
    return to_f32(x);
}

// With group = lane/4 and pair = 2(lane mod 4): registers of a hold rows group, group+8, group,
// group+8 at columns pair and pair+1, from the third on 8 columns further; those of b rows pair and
// pair+1, then 8 further, of column group; d columns pair and pair+1 of rows group and group+8.
template <class T>
static void multiply(void* const* requests) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Mma* from = static_cast<Mma*>(requests[lane]);
        int group = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[group + 8 * (i & 1)][pair + half + 8 * (i >> 1)] = half_of<T>(from->a[i], half);
        for (int i = 0; i < 2; i++)
            for (int half = 0; half < 2; half++)
                b[pair + half + 8 * i][group] = half_of<T>(from->b[i], half);
        for (int i = 0; i < 4; i++) d[group + 8 * (i >> 1)][pair + (i & 1)] = from->d[i];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        const Mma* to = static_cast<Mma*>(requests[lane]);
        int group = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < 4; i++) to->d[i] = d[group + 8 * (i >> 1)][pair + (i & 1)];
    }
}

const char* perform(Collective what, void* const* requests) {
    switch (what) {
        case SYNC: return nullptr;
        case SHUFFLE: return shuffle(requests), nullptr;
        case VOTE: return vote(requests), nullptr;
        case LDMATRIX_2: return load(requests, 2, false);
        case LDMATRIX_4: return load(requests, 4, false);
        case LDMATRIX_2_TRANS: return load(requests, 2, true);
        case LDMATRIX_4_TRANS: return load(requests, 4, true);
        case MMA_BF16: return multiply<bf16>(requests), nullptr;
        case MMA_F16: return multiply<f16>(requests), nullptr;
    }
    return "an unknown collective";
}

}  // namespace emulated
