//! Rows of 8-bit codes with scales: where their bytes lie, how far off they are, and what cannot be stored.

use crate::cache::{Cache, heads, latents};
use crate::common::Random;
use kernels::Rows;
use kernels::attention::{
    CacheMut, CacheSlice, CacheType, FP8_TILE, Mla, PAGE, Pages, Queries, RowShape, mla, write_rows,
};
use kernels::{Isa, reference};

/// A row written to slot 1, and what is read there.
fn stored(shape: RowShape, x: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let bytes = CacheType::Fp8.row_bytes(shape);
    let mut data = vec![0xaa; 3 * bytes];
    write_rows(CacheMut::Fp8 { data: &mut data, shape }, shape.values(), &[1], Rows::new(x, x.len()));
    let outside = data[..bytes].iter().chain(&data[2 * bytes..]);
    assert!(outside.copied().all(|byte| byte == 0xaa), "{shape:?} wrote outside its row");
    let cache = CacheSlice::Fp8 { data: &data, shape };
    let read = reference::cached_row(&Pages { data: cache, row: shape.values(), table: &[0] }, 1);
    (data[bytes..2 * bytes].to_vec(), read)
}

/// Tiles of a row's values: their first values and lengths.
fn tiles(shape: RowShape) -> Vec<(usize, usize)> {
    let mut tiles = Vec::new();
    for head in 0..shape.heads {
        for first in (0..shape.width).step_by(FP8_TILE) {
            tiles.push((head * shape.width + first, FP8_TILE.min(shape.width - first)));
        }
    }
    tiles
}

#[test]
fn rows_are_as_long_as_flashmla_says() {
    let k2 = latents(512, 64);
    let lengths = [CacheType::F32, CacheType::Bf16, CacheType::Fp8].map(|kind| kind.row_bytes(k2));
    assert_eq!(lengths, [2304, 1152, 656]);
    assert_eq!(CacheType::Fp8.row_bytes(latents(96, 8)), 96 + 4 + 16);
    assert_eq!(CacheType::Fp8.row_bytes(heads(4, 128)), 512 + 16);
    assert_eq!(CacheType::Fp8.row_bytes(heads(3, 40)), 120 + 12);
    assert_eq!(CacheType::Fp8.row_bytes(heads(2, 130)), 260 + 16);
}

#[test]
fn bytes_lie_where_they_should() {
    let mut x = vec![0.0; 135];
    // Tiles of 128 and 4 with greatest magnitudes 448 and 56; three plain values.
    (x[0], x[1], x[127], x[129], x[131]) = (-448.0, 1.0, 2.0, 56.0, -14.0);
    (x[132], x[134]) = (1.0, -3.0);
    let (bytes, read) = stored(latents(132, 3), &x);
    let mut want = vec![0; 132];
    (want[0], want[1], want[127], want[129], want[131]) = (0xfe, 0x38, 0x40, 0x7e, 0xee);
    want.extend(1f32.to_le_bytes());
    want.extend(0.125f32.to_le_bytes());
    want.extend([0x80, 0x3f, 0, 0, 0x40, 0xc0]);
    assert_eq!(bytes, want);
    assert_eq!(read, x);
}

/// Random rows of odd shapes, with tiles of very different sizes: every value within 2^-4 of itself, or 2^-10
/// of its tile's scale if it is small.
#[test]
fn values_come_back_within_half_a_step() {
    let mut random = Random(31);
    let shapes = [
        latents(512, 64),
        latents(96, 8),
        latents(1, 0),
        latents(129, 1),
        heads(4, 128),
        heads(3, 40),
        heads(2, 260),
        RowShape { heads: 5, width: 7, plain: 3 },
        RowShape { heads: 0, width: 0, plain: 5 },
    ];
    for shape in shapes {
        for round in 0..20 {
            let mut x = random.values(shape.values());
            for (first, len) in tiles(shape) {
                // From where scales end to the greatest values there are, and all kinds in a tile.
                let size = 2f32.powi(random.below(250) as i32 - 125);
                for x in &mut x[first..first + len] {
                    *x *= size * 2f32.powi(-(random.below(if round % 2 == 0 { 1 } else { 20 }) as i32));
                }
            }
            let (_, read) = stored(shape, &x);
            for (first, len) in tiles(shape) {
                let (x, read) = (&x[first..first + len], &read[first..first + len]);
                let greatest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
                let scale = f64::from((greatest / 448.0).max(f32::MIN_POSITIVE));
                for (x, read) in x.iter().zip(read) {
                    let (x, error) = (f64::from(x.abs()), (f64::from(*x) - f64::from(*read)).abs());
                    // The quotient and the product are rounded too.
                    let bound = (x / 16.0).max(scale / 1024.0) * (1.0 + 1e-6);
                    assert!(error <= bound, "{x} came back {error} off, scale {scale}, {shape:?}");
                }
            }
            let plain = shape.values() - shape.plain;
            for (x, read) in x[plain..].iter().zip(&read[plain..]) {
                assert_eq!(half::bf16::from_f32(*x).to_f32(), *read);
            }
        }
    }
}

#[test]
fn what_is_not_finite_spoils_nothing() {
    let mut random = Random(32);
    let shape = RowShape { heads: 2, width: 200, plain: 4 };
    let x = random.values(shape.values());
    let (_, clean) = stored(shape, &x);
    let scale = clean[128..200].iter().fold(0f32, |a, x| a.max(x.abs()));
    for (bad, want) in [(f32::NAN, 0.0), (f32::INFINITY, scale), (f32::NEG_INFINITY, -scale)] {
        let mut dirty = x.clone();
        dirty[150] = bad;
        let (_, read) = stored(shape, &dirty);
        for (i, (read, clean)) in read.iter().zip(&clean).enumerate() {
            let want = if i == 150 { want } else { *clean };
            assert_eq!(read.to_bits() << 1, want.to_bits() << 1, "[{i}] beside {bad}");
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::MAX, f32::from_bits(1), 0.0, -0.0] {
        let (bytes, read) = stored(shape, &vec![bad; shape.values()]);
        assert!(read[..400].iter().all(|x| x.is_finite()), "a row of {bad}");
        assert!(bytes[..400].iter().all(|code| code & 0x7f != 0x7f), "a row of {bad}");
    }
}

/// Every code at every scale, through attention over one position: what it gives is the value itself.
#[test]
fn every_code_is_read_as_it_is() {
    let shape = latents(256, 0);
    let mla_shape = Mla { heads: 1, latent: 256, rope: 0, scale: 1.0 };
    for scale in [1.0, 0.37, f32::MIN_POSITIVE, 1e30, f32::MAX / 448.0] {
        let mut data: Vec<u8> = (0..=255).map(|code| if code & 0x7f == 0x7f { 0 } else { code }).collect();
        data.extend([f32::to_le_bytes(scale), f32::to_le_bytes(-scale / 3.0)].concat());
        let pages = Pages { data: CacheSlice::Fp8 { data: &data, shape }, row: 256, table: &[0] };
        let want = reference::cached_row(&pages, 0);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; 256];
            let queries = Queries { rows: &[0.0; 256], first_position: 0 };
            mla(isa, &mla_shape, queries, &pages, &mut [], &mut out);
            for (got, want) in out.iter().zip(&want) {
                // Adding to zero leaves no minus at a zero.
                assert_eq!((got + 0.0).to_bits(), (want + 0.0).to_bits(), "{isa:?} at {scale}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "block 3 of a cache of 100 rows")]
fn a_cache_without_the_block_is_refused() {
    let shape = latents(4, 1);
    let data = vec![0; 100 * CacheType::Fp8.row_bytes(shape)];
    let pages = Pages { data: CacheSlice::Fp8 { data: &data, shape }, row: 5, table: &[3] };
    let queries = Queries { rows: &[0.0; 5], first_position: 0 };
    mla(
        Isa::Portable,
        &Mla { heads: 1, latent: 4, rope: 1, scale: 1.0 },
        queries,
        &pages,
        &mut [],
        &mut [0.0; 4],
    );
}

#[test]
#[should_panic(expected = "1 heads of 6 in cache rows of")]
fn heads_that_are_not_the_rows_are_refused() {
    let mut random = Random(33);
    let cache = Cache::random(&mut random, CacheType::Fp8, PAGE, heads(2, 4));
    let queries = Queries { rows: &[0.0; 6], first_position: 0 };
    let shape = Mla { heads: 1, latent: 4, rope: 2, scale: 1.0 };
    mla(Isa::Portable, &shape, queries, &cache.pages(), &mut [], &mut [0.0; 4]);
}
