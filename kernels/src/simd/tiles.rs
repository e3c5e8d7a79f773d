//! The tile registers of AMX: sixteen weight rows of 32 bf16 times up to sixteen columns of x in one instruction.
//!
//! Weight rows are loaded as they lie in the file. Sums are f32. Formula (Intel 64 and IA-32 Architectures Software
//! Developer's Manual, volume 2, `TDPBF16PS`): of 32 values, those at even places are one chain of fused multiply-adds
//! from zero, ascending, and those at odd places another; the two are added, and then added to the sum so far. Subnormal
//! numbers count as zero.

/// Weight rows, and columns of x at most, of one tile.
pub(crate) const TILE: usize = 16;
/// Bytes of a weight row in one tile.
const STEP: usize = 64;
/// Bytes from one block of weight rows to the one it is multiplied together with.
pub(crate) const BESIDE: usize = 16 * 1024;

/// Weight rows as they are stored.
#[derive(Clone, Copy)]
pub(crate) struct WeightRows<'a> {
    /// From the first value of the first row on.
    pub(crate) bytes: &'a [u8],
    /// Bytes from one row to the next.
    pub(crate) stride: usize,
}

/// Tiles of x: of each step one or two, `[pair, column]`, where a dword is two neighbouring values of one column.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    /// From the first tile of interest on.
    pub(crate) dwords: &'a [u32],
    /// Dwords from a pair to the next. If fewer than a tile has columns, the last columns are of no use.
    pub(crate) pair: usize,
    /// Dwords from a tile to the one beside it.
    pub(crate) beside: usize,
    /// Dwords from a step to the next.
    pub(crate) step: usize,
}

/// Sums: of sixteen weight rows, each with up to sixteen columns of x.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct SumTile(pub(crate) [[f32; TILE]; TILE]);

impl SumTile {
    pub(crate) const ZERO: Self = Self([[0.0; TILE]; TILE]);
}

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::{Amx, Tiles};
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use none::{Amx, Tiles};

#[cfg(target_arch = "x86_64")]
mod amx {
    use super::{BESIDE, Columns, STEP, SumTile, TILE, WeightRows};
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::cell::Cell;
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    /// Proof that the processor has tiles of bf16 and that the system lets this process use them.
    #[derive(Clone, Copy)]
    pub(crate) struct Amx(());

    impl Amx {
        pub(crate) fn new() -> Option<Self> {
            static PERMITTED: OnceLock<bool> = OnceLock::new();
            let permitted = PERMITTED.get_or_init(|| {
                // SAFETY: every x86-64 processor has CPUID; a leaf that is not there reads as zeros.
                #[allow(unused_unsafe, reason = "needed before Rust 1.93")]
                let features = unsafe { __cpuid_count(7, 0) }.edx;
                let (bf16, tile) = (1 << 22, 1 << 24);
                features & bf16 != 0 && features & tile != 0 && ask()
            });
            permitted.then_some(Self(()))
        }
    }

    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, for all threads of the process; see the kernel's
    /// `Documentation/arch/x86/xstate.rst`.
    #[cfg(target_os = "linux")]
    fn ask() -> bool {
        const ARCH_PRCTL: usize = 158;
        const REQUEST_PERMISSION: usize = 0x1023;
        const TILE_DATA: usize = 18;
        let mut result = ARCH_PRCTL;
        // SAFETY: a system call that reads no memory; it changes the registers named.
        unsafe {
            asm!(
                "syscall",
                inout("rax") result,
                in("rdi") REQUEST_PERMISSION,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack)
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn ask() -> bool {
        false
    }

    /// What the tile registers are for, as `LDTILECFG` reads it.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        /// Bytes of a row of each tile.
        columns: [u16; 16],
        rows: [u8; 16],
    }

    impl Configuration {
        /// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 x.
        fn new(columns: usize) -> Self {
            let (mut bytes, mut rows) = ([0; 16], [0; 16]);
            for tile in 0..8 {
                bytes[tile] = if matches!(tile, 4 | 5) { STEP as u16 } else { 4 * columns as u16 };
                rows[tile] = TILE as u8;
            }
            Self { palette: 1, start_row: 0, reserved: [0; 14], columns: bytes, rows }
        }
    }

    thread_local! {
        /// Whether there are [`Tiles`] on this thread.
        static TAKEN: Cell<bool> = const { Cell::new(false) };
    }

    /// The tile registers of this thread, for as long as it lives: there is one at a time, since the last configuration
    /// counts for all.
    pub(crate) struct Tiles {
        columns: usize,
        // Tile registers are the thread's.
        thread: PhantomData<*const ()>,
    }

    impl Tiles {
        /// For tiles of x of `columns`, 1 to [`TILE`].
        ///
        /// # Panics
        /// If this thread has others.
        pub(crate) fn new(_: Amx, columns: usize) -> Self {
            assert!((1..=TILE).contains(&columns), "a tile of {columns} columns");
            assert!(!TAKEN.replace(true), "the tile registers are in use");
            let configuration = Configuration::new(columns);
            // SAFETY: the token proves AMX; 64 bytes are read.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
            Self { columns, thread: PhantomData }
        }

        /// Adds to tile `b * across + v` of `sums`, `[weight row, column of 16]`, the products of block b of sixteen weight
        /// rows with tile v of x, over `steps` steps of 32 values, for `B` blocks and `V` tiles, each 1 or 2. If `FRESH`,
        /// replaces sums. Only columns that there are change. With `AHEAD`, asks for as many steps of sixteen rows at `next`,
        /// of which nothing need be there: into the first cache for one block, into the second for two. Two blocks are
        /// [`BESIDE`] bytes apart.
        ///
        /// # Panics
        /// If there is less of anything.
        #[inline]
        pub(crate) fn multiply<const B: usize, const V: usize, const FRESH: bool, const AHEAD: bool>(
            &self,
            w: WeightRows<'_>,
            x: Columns<'_>,
            steps: usize,
            (sums, across): (&mut [SumTile], usize),
            (next, ahead): (*const u8, usize),
        ) {
            assert!(B == 1 || w.stride * TILE == BESIDE, "blocks {} bytes apart", w.stride * TILE);
            assert!(V <= across, "{V} tiles of {across}");
            assert!(steps > 0, "no steps");
            assert!(w.bytes.len() >= (B * TILE - 1) * w.stride + steps * STEP, "weights of {steps} steps");
            let last = (steps - 1) * x.step + (V - 1) * x.beside + (TILE - 1) * x.pair;
            assert!(x.dwords.len() >= last + self.columns, "x of {steps} steps");
            assert!(sums.len() >= (B - 1) * across + V, "sums of {B} x {V} tiles");
            let first_sums = sums.as_mut_ptr();
            // Registers that change are given by value; tile registers are used by nothing else that is compiled, and
            // hold nothing from one of these blocks to the next.
            macro_rules! block {
                ($load:expr, $more:expr, $store:expr, $ahead:expr) => {
                    // SAFETY: tiles are configured as `self` says while it lives, which is alone, and the assertions say that everything read and
                    // written is there: per step 64 bytes of 16 rows of each block and a tile of x, or two; of sums, tiles
                    // of 16 rows of 64 bytes. Asking for a line that is not there does nothing.
                    unsafe {
                        asm!(
                            "/* perhaps unused: {x2} {c2} {beside} */",
                            $load,
                            "2:",
                            "tileloadd tmm6, [{x} + {row}]",
                            "tileloadd tmm4, [{w} + {stride}]",
                            "tdpbf16ps tmm0, tmm4, tmm6",
                            $more,
                            $ahead,
                            "add {w}, 64",
                            "add {x}, {step}",
                            "add {x2}, {step}",
                            "dec {count}",
                            "jnz 2b",
                            "tilestored [{c} + {line}], tmm0",
                            $store,
                            w = inout(reg) w.bytes.as_ptr() => _,
                            stride = in(reg) w.stride,
                            x = inout(reg) x.dwords.as_ptr() => _,
                            x2 = inout(reg) x.dwords.as_ptr().wrapping_add(x.beside) => _,
                            row = in(reg) 4 * x.pair,
                            step = in(reg) 4 * x.step,
                            count = inout(reg) steps => _,
                            c = in(reg) first_sums,
                            c2 = in(reg) first_sums.wrapping_add((B - 1) * across),
                            line = in(reg) 4 * TILE,
                            next = inout(reg) next => _,
                            ahead = in(reg) ahead,
                            thrice = in(reg) 3 * ahead,
                            beside = const BESIDE,
                            options(nostack)
                        )
                    }
                };
            }
            /// Asks for a line of each of four rows.
            macro_rules! four {
                ($ask:literal) => {
                    concat!(
                        $ask,
                        " [{next}]\n",
                        $ask,
                        " [{next} + {ahead}]\n",
                        $ask,
                        " [{next} + 2 * {ahead}]\n",
                        $ask,
                        " [{next} + {thrice}]\n"
                    )
                };
            }
            macro_rules! down {
                () => {
                    "lea {next}, [{next} + 4 * {ahead}]\n"
                };
            }
            macro_rules! sixteen {
                ($ask:literal) => {
                    concat!(
                        four!($ask),
                        down!(),
                        four!($ask),
                        down!(),
                        four!($ask),
                        down!(),
                        four!($ask),
                        "sub {next}, {thrice}\nsub {next}, {thrice}\nsub {next}, {thrice}\nsub {next}, {thrice}\n",
                        "add {next}, 64"
                    )
                };
            }
            macro_rules! either {
                ($load:expr, $more:expr, $store:expr) => {
                    if AHEAD && B == 1 {
                        block!($load, $more, $store, sixteen!("prefetcht0"))
                    } else if AHEAD {
                        block!($load, $more, $store, sixteen!("prefetcht1"))
                    } else {
                        block!($load, $more, $store, "/* {next} {ahead} {thrice} */")
                    }
                };
            }
            macro_rules! each {
                ($load:expr, $more:expr, $store:expr) => {
                    if FRESH {
                        either!("tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3", $more, $store)
                    } else {
                        either!(concat!("tileloadd tmm0, [{c} + {line}]\n", $load), $more, $store)
                    }
                };
            }
            match (B, V) {
                (1, 1) => each!("", "", ""),
                (1, _) => each!(
                    "tileloadd tmm1, [{c} + {line} + 1024]",
                    "tileloadd tmm7, [{x2} + {row}]\ntdpbf16ps tmm1, tmm4, tmm7",
                    "tilestored [{c} + {line} + 1024], tmm1"
                ),
                (_, 1) => each!(
                    "tileloadd tmm2, [{c2} + {line}]",
                    "tileloadd tmm5, [{w} + {stride} + {beside}]\ntdpbf16ps tmm2, tmm5, tmm6",
                    "tilestored [{c2} + {line}], tmm2"
                ),
                _ => each!(
                    "tileloadd tmm1, [{c} + {line} + 1024]\n\
                     tileloadd tmm2, [{c2} + {line}]\n\
                     tileloadd tmm3, [{c2} + {line} + 1024]",
                    "tileloadd tmm7, [{x2} + {row}]\ntdpbf16ps tmm1, tmm4, tmm7\n\
                     tileloadd tmm5, [{w} + {stride} + {beside}]\ntdpbf16ps tmm2, tmm5, tmm6\n\
                     tdpbf16ps tmm3, tmm5, tmm7",
                    "tilestored [{c} + {line} + 1024], tmm1\n\
                     tilestored [{c2} + {line}], tmm2\n\
                     tilestored [{c2} + {line} + 1024], tmm3"
                ),
            }
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // Tiles in use make every switch of threads save 8 KiB.
            // SAFETY: there were tiles, so there is AMX.
            unsafe { asm!("tilerelease", options(nomem, nostack)) };
            TAKEN.set(false);
        }
    }
}

/// Processors without.
#[cfg(not(target_arch = "x86_64"))]
mod none {
    use super::{Columns, SumTile, WeightRows};

    #[derive(Clone, Copy)]
    pub(crate) enum Amx {}

    impl Amx {
        pub(crate) fn new() -> Option<Self> {
            None
        }
    }

    pub(crate) struct Tiles(Amx);

    impl Tiles {
        pub(crate) fn new(amx: Amx, _: usize) -> Self {
            Self(amx)
        }

        pub(crate) fn multiply<const B: usize, const V: usize, const FRESH: bool, const AHEAD: bool>(
            &self,
            _: WeightRows<'_>,
            _: Columns<'_>,
            _: usize,
            _: (&mut [SumTile], usize),
            _: (*const u8, usize),
        ) {
            match self.0 {}
        }
    }
}
