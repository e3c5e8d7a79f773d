//! Loops of one instruction each, and a read of memory that does nothing else: what a machine can do at most.
//!
//! Inline assembly, so that no compiler can shorten them. Twelve accumulators hide the latency of every
//! instruction here (at most 6 cycles, at most two a cycle).

use std::hint::black_box;

use super::Bound;

/// One way to compute with one kind of value.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// What it measures.
    pub bound: Bound,
    /// Instruction set, for the row's name.
    pub isa: &'static str,
    /// Operations of one turn of the loop; a multiply-add counts as two.
    pub operations: u64,
    /// Runs so many turns. Only made where the processor has the instructions.
    turns: fn(u64),
}

impl Peak {
    /// Runs so many turns.
    pub fn run(&self, turns: u64) {
        (self.turns)(turns);
    }
}

/// All that this processor has, the best of each kind first.
pub fn peaks() -> Vec<Peak> {
    let mut peaks = Vec::new();
    #[cfg(target_arch = "x86_64")]
    x86::add(&mut peaks);
    peaks.push(Peak { bound: Bound::F32, isa: "portable", operations: 2 * 64, turns: portable_f32 });
    peaks.push(Peak { bound: Bound::Int16, isa: "portable", operations: 2 * 64, turns: portable_int::<i16> });
    peaks.push(Peak { bound: Bound::Int8, isa: "portable", operations: 2 * 64, turns: portable_int::<i8> });
    peaks
}

fn portable_f32(turns: u64) {
    let (x, mut sums) = (black_box([0.5f32; 64]), [0.0f32; 64]);
    for _ in 0..turns {
        // Two roundings: without the instruction a fused multiply-add is a call.
        sums.iter_mut().zip(&x).for_each(|(sum, x)| *sum += x * x);
        sums = black_box(sums);
    }
}

fn portable_int<T: Copy + Into<i32> + From<i8>>(turns: u64) {
    let (x, mut sums) = (black_box([T::from(3i8); 64]), [0i32; 64]);
    for _ in 0..turns {
        for (sum, &x) in sums.iter_mut().zip(&x) {
            let x: i32 = x.into();
            *sum = sum.wrapping_add(x * x);
        }
        sums = black_box(sums);
    }
}

/// Reads all bytes once, front to back, asking for those `prefetch` bytes ahead (0: not asking).
pub fn read(bytes: &[u8], prefetch: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        let blocks = bytes.len() / x86::READ_BLOCK;
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions, and `blocks` whole blocks are in the slice.
            return unsafe { x86::read_avx512(bytes.as_ptr(), blocks, prefetch) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { x86::read_avx2(bytes.as_ptr(), blocks, prefetch) };
        }
    }
    let _ = prefetch;
    let mut sums = [0u64; 16];
    for block in bytes.as_chunks::<128>().0 {
        for (sum, word) in sums.iter_mut().zip(block.as_chunks::<8>().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::is_x86_feature_detected as has;

    use kernels::Isa;

    use super::{Bound, Peak};

    /// Bytes of one turn of the reading loops.
    pub const READ_BLOCK: usize = 512;

    pub fn add(peaks: &mut Vec<Peak>) {
        let mut add = |present: bool, bound, isa, operations: u64, turns| {
            if present {
                peaks.push(Peak { bound, isa, operations: 12 * operations, turns });
            }
        };
        let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512vl");
        let avx2 = has!("avx2") && has!("fma");
        add(avx512, Bound::F32, "avx512", 2 * 16, f32_avx512 as fn(u64));
        add(avx512 && has!("avx512bf16"), Bound::Bf16, "avx512", 2 * 32, bf16_avx512);
        // (The system must be asked for tiles, which [`Isa`] does.)
        let tiles = Isa::available().contains(&Isa::Avx512Amx);
        add(tiles, Bound::Tiles, "amx", 2 * 16 * 16 * 32, tiles_amx);
        add(avx512 && has!("avx512vnni"), Bound::Int16, "avx512", 2 * 32, int16_avx512);
        add(avx512 && has!("avx512vnni"), Bound::Int8, "avx512", 2 * 64, int8_avx512);
        add(avx2, Bound::F32, "avx2", 2 * 8, f32_avx2);
        add(avx2 && has!("avxvnni"), Bound::Int16, "avxvnni", 2 * 16, int16_avxvnni);
        add(avx2 && has!("avxvnni"), Bound::Int8, "avxvnni", 2 * 32, int8_avxvnni);
        add(avx2, Bound::Int16, "avx2", 2 * 16, int16_avx2);
        add(avx2, Bound::Int8, "avx2", 2 * 32, int8_avx2);
    }

    /// A function that runs a loop of twelve equal steps. A step is text with the number of its accumulator (0 to
    /// 11) between the pieces; its factors are in registers 12 and 13, and 14 is free. The factors' bits are two
    /// bf16 near 0.5, one f32 near 0.5 and some integers.
    macro_rules! turns {
        (@step $n:literal, $piece:literal $(, $more:literal)*) => { concat!($piece $(, $n, $more)*) };
        (@zero $n:literal) => { concat!("vpxor xmm", $n, ", xmm", $n, ", xmm", $n) };
        ($name:ident, $width:ident, $($piece:literal),+) => {
            fn $name(turns: u64) {
                if turns == 0 {
                    return;
                }
                // SAFETY: `add` hands this function out only where the processor has the instructions. The code
                // touches no memory, and no register but those it names.
                unsafe {
                    asm!(
                        factors!($width),
                        turns!(@zero "0"), turns!(@zero "1"), turns!(@zero "2"), turns!(@zero "3"),
                        turns!(@zero "4"), turns!(@zero "5"), turns!(@zero "6"), turns!(@zero "7"),
                        turns!(@zero "8"), turns!(@zero "9"), turns!(@zero "10"), turns!(@zero "11"),
                        "2:",
                        turns!(@step "0", $($piece),+), turns!(@step "1", $($piece),+),
                        turns!(@step "2", $($piece),+), turns!(@step "3", $($piece),+),
                        turns!(@step "4", $($piece),+), turns!(@step "5", $($piece),+),
                        turns!(@step "6", $($piece),+), turns!(@step "7", $($piece),+),
                        turns!(@step "8", $($piece),+), turns!(@step "9", $($piece),+),
                        turns!(@step "10", $($piece),+), turns!(@step "11", $($piece),+),
                        "dec {turns}",
                        "jnz 2b",
                        "vzeroupper",
                        turns = inout(reg) turns => _,
                        inout("xmm12") f32::from_bits(0x3f01_3f01) => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                        out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                        out("xmm10") _, out("xmm11") _, out("xmm13") _, out("xmm14") _,
                        options(nomem, nostack),
                    );
                }
            }
        };
    }

    /// Twelve products of full tiles a turn, in four tiles of sums.
    fn tiles_amx(turns: u64) {
        /// What `LDTILECFG` reads: palette 1, then from byte 16 the bytes of a row, and from byte 48 the rows, of each tile.
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for tile in 0..8 {
            configuration.0[16 + 2 * tile] = 64;
            configuration.0[48 + tile] = 16;
        }
        if turns == 0 {
            return;
        }
        // SAFETY: `add` hands this function out only where the processor has tiles. 64 bytes are read; tile registers
        // are used by nothing else that is compiled.
        unsafe {
            asm!(
                "ldtilecfg [{configuration}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {turns}",
                "jnz 2b",
                "tilerelease",
                configuration = in(reg) &raw const configuration,
                turns = inout(reg) turns => _,
                options(nostack, readonly),
            );
        }
    }

    /// Fills registers 12 and 13 from the lowest four bytes of the former.
    macro_rules! factors {
        (zmm) => {
            "vpbroadcastd zmm12, xmm12\nvmovdqa64 zmm13, zmm12"
        };
        (ymm) => {
            "vpbroadcastd ymm12, xmm12\nvmovdqa ymm13, ymm12"
        };
    }

    turns!(f32_avx512, zmm, "vfmadd231ps zmm", ", zmm12, zmm13");
    turns!(bf16_avx512, zmm, "vdpbf16ps zmm", ", zmm12, zmm13");
    turns!(int16_avx512, zmm, "vpdpwssd zmm", ", zmm12, zmm13");
    turns!(int8_avx512, zmm, "vpdpbusd zmm", ", zmm12, zmm13");
    turns!(f32_avx2, ymm, "vfmadd231ps ymm", ", ymm12, ymm13");
    turns!(int16_avxvnni, ymm, "{{vex}} vpdpwssd ymm", ", ymm12, ymm13");
    turns!(int8_avxvnni, ymm, "{{vex}} vpdpbusd ymm", ", ymm12, ymm13");
    turns!(int16_avx2, ymm, "vpmaddwd ymm14, ymm12, ymm13\nvpaddd ymm", ", ymm", ", ymm14");
    turns!(
        int8_avx2,
        ymm,
        "vpmaddubsw ymm14, ymm12, ymm13\nvpmaddwd ymm14, ymm14, ymm12\nvpaddd ymm",
        ", ymm",
        ", ymm14"
    );

    /// A function that loads every byte once, in blocks of [`READ_BLOCK`], with or without prefetches.
    macro_rules! reads {
        ($name:ident, $feature:literal, $load:literal, $($at:literal),+) => {
            /// # Safety
            /// The processor must have the instructions, and `READ_BLOCK * blocks` bytes be readable.
            #[target_feature(enable = $feature)]
            pub unsafe fn $name(start: *const u8, blocks: usize, prefetch: usize) {
                if blocks == 0 {
                    return;
                }
                let bytes = blocks * READ_BLOCK;
                // SAFETY: reads `bytes` bytes from `start`; a prefetch may name any address.
                unsafe {
                    if prefetch == 0 {
                        asm!(
                            "2:", $(concat!($load, ", [{at} + ", $at, "]"),)+
                            "add {at}, 512", "cmp {at}, {end}", "jb 2b", "vzeroupper",
                            at = inout(reg) start => _, end = in(reg) start.add(bytes),
                            out("xmm0") _, options(nostack, readonly),
                        );
                    } else {
                        asm!(
                            "2:", $(concat!($load, ", [{at} + ", $at, "]"),)+
                            "prefetcht0 [{at} + {ahead}]", "prefetcht0 [{at} + {ahead} + 64]",
                            "prefetcht0 [{at} + {ahead} + 128]", "prefetcht0 [{at} + {ahead} + 192]",
                            "prefetcht0 [{at} + {ahead} + 256]", "prefetcht0 [{at} + {ahead} + 320]",
                            "prefetcht0 [{at} + {ahead} + 384]", "prefetcht0 [{at} + {ahead} + 448]",
                            "add {at}, 512", "cmp {at}, {end}", "jb 2b", "vzeroupper",
                            at = inout(reg) start => _, end = in(reg) start.add(bytes),
                            ahead = in(reg) prefetch,
                            out("xmm0") _, options(nostack, readonly),
                        );
                    }
                }
            }
        };
    }

    reads!(read_avx512, "avx512f", "vmovdqu64 zmm0", "0", "64", "128", "192", "256", "320", "384", "448");
    reads!(
        read_avx2,
        "avx2",
        "vmovdqu ymm0",
        "0",
        "32",
        "64",
        "96",
        "128",
        "160",
        "192",
        "224",
        "256",
        "288",
        "320",
        "352",
        "384",
        "416",
        "448",
        "480"
    );
}
