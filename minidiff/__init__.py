"""minidiff: DeepFloyd IF you can read in an afternoon.

The files in reading order; each imports only from files above it (tests/test_layout.py keeps it so).

    schedule.py              how much noise at which time, and which times a sampler visits
    ddpm.py                  noise forward, estimate back, one reverse step, the losses
    sampling.py              the one denoising loop
    guidance.py              classifier-free guidance and dynamic thresholding
    toy.py                   denoisers with a known answer, to test everything else against
    views.py                 turning and shuffling pictures, and what makes a view a good one
    components.py            parts of a picture: near and far, grey and colour
    factorized.py            several prompts in one picture: the formula of anagrams and hybrids
    editing.py               starting from a picture, and keeping some of it

    images.py                plumbing: picture files, labelled strips, GIFs
    charts.py                plumbing: loss curves
    hub.py                   plumbing: which models there are, where they lie, fetching them
    weights.py               plumbing: mapping weights into networks, writing and checking them
    cli.py                   plumbing: flags, errors and the last line of every command
    training.py              the one training loop, of the cascade and of the digits

    deepfloyd/tokenizer.py   prompt to ids
    deepfloyd/t5.py          ids to text states
    deepfloyd/prompts.py     prompts to states, whole or streamed, and files of them
    deepfloyd/unet.py        noisy picture, time and text to noise and variance
    deepfloyd/stages.py      prompts, weights and UNets become predictions
    deepfloyd/pictures.py    captioned pictures to train on
    deepfloyd/initial.py     the weights that training begins with
    deepfloyd/train.py       training a cascade on captioned pictures

    cascade.py               what the commands on pictures are made of
    encode.py                prompts to a file of embeddings
    denoise.py               noise added to a picture, and three ways to take it away
    generate.py              a prompt becomes a picture, 64 and 256 pixels
    sdedit.py                a picture made anew from the middle of the walk
    inpaint.py               a region painted anew
    anagram.py               one picture, several views, several prompts
    hybrid.py                one picture, several components, several prompts
    upscale.py               any picture four times as large

    flow.py                  flow matching: straight lines from noise to data, and solvers to follow them

    mnist/data.py            the digits in memory
    mnist/unet.py            the small UNet of the course
    mnist/levels.py          reference levels: the losses of three simple answers
    mnist/models.py          trained networks on disk, their samples and figures
    mnist/trainer.py         the flags, plans and epochs that the trainers share
    mnist/judge.py           a classifier that judges samples
    mnist/train_denoiser.py  noise taken away in one step
    mnist/train_diffusion.py digits from noise by DDPM
    mnist/train_flow.py      digits from noise by flow matching
    mnist/sample.py          digits from the trained networks
    mnist/anagram.py         one digit that is two, and how often that succeeds

Run `python -m minidiff` for the list of commands.
"""
