//! Fun's camera adapter: the rays of every pixel to one vector for each token, forward only.
//!
//! Source: aigc-apps/VideoX-Fun videox_fun/models/wan_camera_adapter.py `SimpleAdapter`.

use kernels::conv3d::{Conv3dGeometry, Padding, conv3d};
use kernels::weight::Weight;
use kernels::{Device, Tensor, video};

use super::config::PATCH;
use super::control::{CAMERA_CHANNELS, CameraSizes};
use super::reader::Reader;
use crate::{Error, Result};

/// The adapter: pixels of a latent to channels, a convolution over patches, and a residual block of two convolutions.
#[derive(Debug, Clone)]
pub(super) struct CameraAdapter {
    sizes: CameraSizes,
    patch: (Weight, Tensor),
    /// Weights [d, d, 1, 3, 3] with their biases.
    residual: [(Tensor, Tensor); 2],
}

impl CameraAdapter {
    pub fn load(read: &Reader, sizes: CameraSizes) -> Result<Self> {
        let conv = |n: usize| -> Result<(Tensor, Tensor)> {
            let module = format!("control_adapter.residual_blocks.0.conv{n}");
            let weight = video::arranged(&read.tensor(&module, ".weight")?.unsqueeze(2)?)?;
            Ok((weight, read.tensor(&module, ".bias")?))
        };
        Ok(Self { sizes, patch: read.dense("control_adapter.conv")?, residual: [conv(1)?, conv(2)?] })
    }

    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { patch, residual, .. } = self;
        let residual = residual.iter_mut().flat_map(|(weight, bias)| [weight, bias]);
        patch.0.tensors_mut().into_iter().chain([&mut patch.1]).chain(residual).collect()
    }

    /// What is added to the tokens of latents of `grid` = (frames, height, width): [b, l, d] in the compute dtype. The rays
    /// [b, 24, t, 8h, 8w] may be on the host: each frame is copied to `device` when it is used, since all are as large as
    /// the clip in pixels.
    ///
    /// # Errors
    /// Rays of other sizes than the latents'.
    pub fn forward(
        &self,
        rays: &Tensor,
        (frames, height, width): (usize, usize, usize),
        device: &Device,
    ) -> Result<Tensor> {
        let batch = rays.dim(0)?;
        let (tall, wide) = (height * self.sizes.stride, width * self.sizes.stride);
        if rays.dims() != [batch, CAMERA_CHANNELS, frames, tall, wide] {
            return Err(Error::Mismatch(format!(
                "the rays of a camera path (camera) have shape {:?}: [{batch}, {CAMERA_CHANNELS}, {frames}, {tall}, {wide}] \
                 is expected",
                rays.dims()
            )));
        }
        let of_frame = |frame: usize| {
            let rays = rays.narrow(2, frame, 1)?.squeeze(2)?.contiguous()?.to_device(device)?;
            self.frame(&rays)
        };
        let frames = (0..frames).map(of_frame).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&frames, 1)?)
    }

    /// The tokens [b, h/2 w/2, d] of one latent frame's rays [b, 24, 8h, 8w].
    fn frame(&self, rays: &Tensor) -> Result<Tensor> {
        let (batch, channels, tall, wide) = rays.dims4()?;
        let stride = self.sizes.stride;
        let (rows, columns) = (tall / stride / PATCH, wide / stride / PATCH);
        // The channels of the first convolution are (channel, row in the latent, column in it), its window is a patch.
        let pixels = rays
            .reshape(&[batch * channels, rows, PATCH, stride, columns, PATCH, stride][..])?
            .permute([0, 1, 4, 3, 6, 2, 5])?
            .contiguous()?
            .reshape((batch, channels, rows * columns, stride * stride * PATCH * PATCH))?;
        let patches =
            pixels.transpose(1, 2)?.contiguous()?.flatten_from(2)?.to_dtype(self.patch.0.dtype())?;
        let tokens = kernels::linear::forward(&patches, &self.patch.0, Some(&self.patch.1), None)?;
        let width = tokens.dim(2)?;
        let grid = tokens.reshape((batch, 1, rows, columns, width))?.permute([0, 4, 1, 2, 3])?;
        let grid = video::arranged(&grid)?;
        let [first, second] = &self.residual;
        let conv = |x: &Tensor, (weight, bias): &(Tensor, Tensor)| {
            conv3d(x, weight, Some(bias), Conv3dGeometry::unit(Padding::all(1)))
        };
        let grid = video::add(&conv(&video::relu(&conv(&grid, first)?)?, second)?, &grid)?;
        Ok(grid.permute([0, 2, 3, 4, 1])?.contiguous()?.reshape((batch, rows * columns, width))?)
    }
}
