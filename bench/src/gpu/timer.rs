//! Times by replays of a graph in which the work is done several times, each turn with inputs of its own.

use kernels::cuda::DeviceError;

use super::{Gpu, doing};
use crate::Error;
use crate::ceilings::Work;
use crate::row::{Row, Times};

/// Times of one turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// On the device, by events around each replay.
    pub times: Times,
}

impl Gpu<'_> {
    /// Times `launch`, which gets the number of the turn.
    pub(super) fn replay(
        &self,
        turns: usize,
        mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<Turn, DeviceError> {
        // Kernels are loaded now and not in the capture.
        launch(0)?;
        let graph = self.device.capture(|| (0..turns).try_for_each(&mut launch))?;
        graph.launch()?;
        let all = self.runs(self.runs, || graph.launch())?;
        let turn = |seconds: f64| seconds / turns as f64;
        let times =
            Times { median: turn(all.median), min: turn(all.min), max: turn(all.max), runs: all.runs };
        Ok(Turn { times })
    }

    /// Times `launch`, writes the row, and gives back the median of a turn's seconds.
    pub(super) fn time(
        &mut self,
        name: &str,
        turns: usize,
        work: Work,
        launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<f64, Error> {
        self.time_with(name, turns, work, launch, |row| row)
    }

    /// The same with more to say in the row.
    pub(super) fn time_with(
        &mut self,
        name: &str,
        turns: usize,
        work: Work,
        launch: impl FnMut(usize) -> Result<(), DeviceError>,
        more: impl FnOnce(Row) -> Row,
    ) -> Result<f64, Error> {
        let Turn { times } =
            self.replay(turns, launch).map_err(|error| doing(format!("time {name}"), error))?;
        let share = self.peaks.share(work, times.median);
        let row = Row::new(name, times, (work.bytes, work.operations), share, &self.setting);
        self.row(more(row.with("turns", turns)))?;
        Ok(times.median)
    }
}
