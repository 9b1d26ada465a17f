"""minidiff: DeepFloyd IF to read, to run and to be sure of.

The files in reading order; each imports only from files above it (tests/test_layout.py keeps it so). Begin with
schedule.py. README.md names the 13 files that take an afternoon.

    equations.py             every equation: formula, home, test, chapter
    checks.py                checks of arguments
    schedule.py              how much noise at which time, and which times a sampler visits
    ddpm.py                  noise forward, estimate back, one reverse step, the losses
    solvers.py               fewer steps: DDIM and DPM-Solver++
    sampling.py              the one denoising loop
    guidance.py              classifier-free guidance and dynamic thresholding
    toy.py                   denoisers with a known answer, to test everything else against
    flow.py                  flow matching: straight lines from noise to data, and solvers to follow them
    notation.py              alpha-bar, sigma, time; eps, v, score, velocity: from one notation to another

    jigsaw.py                a puzzle whose pieces change places, one of the views
    views.py                 turning and shuffling images, and what makes a view a good one
    components.py            parts of an image: near and far, grey and colour
    factorized.py            several prompts in one image: the formula of anagrams and hybrids
    checkpoint.py            weights mapped into networks; files written whole
    images.py                image files, labelled sheets, GIFs
    editing.py               starting from an image, and keeping some of it

    deepfloyd/tokenizer.py   prompt to ids
    deepfloyd/t5.py          ids to text states
    deepfloyd/text.py        prompts to states, whole or streamed, and files of them
    deepfloyd/unet.py        noisy image, time and text to noise and variance
    deepfloyd/stages.py      a UNet with its process, asked as a model
    cli.py                   what every command shares: errors, Ctrl-C, the device
    weights.py               which models there are, where they lie, fetching and checking them
    deepfloyd/vocabulary.py  the words of captions and prompts, and those that a cascade never saw
    cascade.py               the door, `Cascade`: prompts and images in, images out

    flags.py                 the flags of the commands that draw
    encode.py                prompts to a file of states
    generate.py              a prompt becomes an image, 64 and 256 pixels
    denoise.py               noise added to an image, and three ways to take it away
    sdedit.py                an image made anew from the middle of the walk
    inpaint.py               a region painted anew
    anagram.py               one image, several views, several prompts
    hybrid.py                one image, several components, several prompts
    upscale.py               any image four times as large

    charts.py                loss curves, of one run or of several
    training.py              the one training loop, of the cascade and of the digits
    deepfloyd/dataset.py     captioned images to train on
    deepfloyd/initial.py     the networks that training begins with
    deepfloyd/train.py       training a cascade on captioned images
    deepfloyd/judge.py       a classifier that says whether images show what their prompts say

    mnist/data.py            the digits in memory
    mnist/unet.py            the small UNet of the course
    mnist/levels.py          reference levels: the losses of three simple answers
    mnist/models.py          trained networks on disk, their samples and figures
    mnist/trainer.py         the flags, plans and epochs that the trainers share
    mnist/judge.py           a classifier that judges samples
    mnist/sample.py          digits from the trained networks
    mnist/train_denoiser.py  noise taken away in one step
    mnist/train_diffusion.py digits from noise by DDPM
    mnist/train_flow.py      digits from noise by flow matching
    mnist/anagram.py         one digit that is two, and how often that succeeds

Run `python -m minidiff` for the list of commands.
"""

import os
import signal
import sys

if sys.argv[0] == "-m":  # a command is starting: until its main begins, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
